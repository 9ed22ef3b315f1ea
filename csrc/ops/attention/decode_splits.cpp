#include "ops/attention/decode_splits.h"

#include <algorithm>

namespace dpn {

namespace {

constexpr std::int64_t kBlocksPerMultiprocessor = 4;
constexpr std::int64_t kMostSplits = 64;
constexpr std::int64_t kHeadsPerBlock = 8;

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace

int num_decode_splits(std::int64_t num_seqs, std::int64_t num_heads, std::int64_t num_kv_heads,
                      std::int64_t max_context, int num_multiprocessors) {
  const std::int64_t blocks = num_seqs * num_kv_heads * ceil_div(num_heads / num_kv_heads, kHeadsPerBlock);
  const std::int64_t wanted =
      ceil_div(kBlocksPerMultiprocessor * num_multiprocessors, std::max<std::int64_t>(blocks, 1));
  const std::int64_t possible = ceil_div(max_context, kShortestSplit);
  return static_cast<int>(std::clamp<std::int64_t>(std::min(wanted, possible), 1, kMostSplits));
}

}  // namespace dpn
