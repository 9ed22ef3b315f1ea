// Chooses the number of splits of decode attention on the GPU, from sizes that the host knows without reading the
// device.
#pragma once

#include <cstdint>

namespace dpn {

// Least number of keys in a part, unless a sequence has fewer. A block takes two turns for it where head_dim is 128.
constexpr int kShortestSplit = 64;

// Number of parts that the keys of every sequence are cut into: enough blocks to keep every multiprocessor reading, but
// no part so short that merging costs more than reading.
//
// max_context: most keys of a sequence.
int num_decode_splits(std::int64_t num_seqs, std::int64_t num_heads, std::int64_t num_kv_heads,
                      std::int64_t max_context, int num_multiprocessors);

}  // namespace dpn
