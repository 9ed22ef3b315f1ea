#include "ops/reduction/segmented_top_k.h"

#include "core/check.h"

namespace dpn {

namespace {

void run(const SegmentedTopKParams& params, const Tensor& scores, Stream stream) {
  DPN_CALL_KERNEL(segmented_top_k_kernel, params, scores, stream)
}

void check_content(const Checker& check, const SegmentedTopKParams& p, std::int64_t num_kept) {
  check_offsets(check, "cu_scores", p.cu_scores, p.num_segments, p.num_scores, "num_scores");
  check_offsets(check, "cu_kept", p.cu_kept, p.num_segments, num_kept, "num_kept");
  for (std::int64_t s = 0; s < p.num_segments; ++s) {
    const std::int64_t count = p.cu_scores[s + 1] - p.cu_scores[s], kept = p.cu_kept[s + 1] - p.cu_kept[s];
    if (count > kMostScores) {
      check.fail("cu_scores gives segment " + std::to_string(s) + " " + std::to_string(count) +
                 " scores, expected at most " + std::to_string(kMostScores));
    }
    if (kept > count) {
      check.fail("cu_kept keeps " + std::to_string(kept) + " scores of segment " + std::to_string(s) +
                 ", expected at most its " + std::to_string(count));
    }
  }
}

}  // namespace

void segmented_top_k(const Tensor& out, const Tensor& scores, const Tensor& cu_scores, const Tensor& cu_kept,
                     Stream stream) {
  const Checker check("segmented_top_k", scores);
  Dim num_scores("num_scores"), num_offsets("num_segments + 1"), num_kept("num_kept");
  check.contiguous("scores", scores, {&num_scores}, {DType::f32})
      .contiguous("cu_scores", cu_scores, {&num_offsets}, {DType::i32})
      .condition(num_offsets > 0, "cu_scores is empty, expected num_segments + 1 entries")
      .contiguous("cu_kept", cu_kept, {&num_offsets}, {DType::i32})
      .contiguous("out", out, {&num_kept}, {DType::i32})
      .no_overlap({{"out", &out}}, {{"scores", &scores}, {"cu_scores", &cu_scores}, {"cu_kept", &cu_kept}});
  const SegmentedTopKParams params{.out = out.as<std::int32_t>(),
                                   .scores = scores.as<float>(),
                                   .cu_scores = cu_scores.as<std::int32_t>(),
                                   .cu_kept = cu_kept.as<std::int32_t>(),
                                   .num_scores = num_scores,
                                   .num_segments = num_offsets - 1};
  if (check.can_read()) check_content(check, params, num_kept);
  run(params, scores, stream);
}

}  // namespace dpn
