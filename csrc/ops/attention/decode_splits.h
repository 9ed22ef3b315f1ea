// How decode attention on the GPU is cut, from what the host knows without reading the device.
#pragma once

#include <cstdint>

namespace dpn {

// Keys of a part at least, unless a sequence has fewer: two turns of a block where head_dim is 128.
constexpr int kShortestSplit = 64;

// Parts that the keys of every sequence are cut into: enough blocks to keep every multiprocessor reading, none so short
// that merging costs more than reading.
//
// max_context: keys that a sequence has at most.
int num_decode_splits(std::int64_t num_seqs, std::int64_t num_heads, std::int64_t num_kv_heads,
                      std::int64_t max_context, int num_multiprocessors);

}  // namespace dpn
