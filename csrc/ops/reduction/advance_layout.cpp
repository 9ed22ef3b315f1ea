#include "ops/reduction/advance_layout.h"

#include "core/check.h"
#include "ops/reduction/pooled_grid.h"

namespace dpn {

namespace {

void run(const AdvanceLayoutParams& params, const Tensor& cu_seqlens, Stream stream) {
  DPN_CALL_KERNEL(advance_layout_kernel, params, cu_seqlens, stream)
}

// Checks that the router rows of sequence b are rows of that sequence.
void check_router_rows(const Checker& check, const AdvanceLayoutParams& p, std::int64_t b) {
  const std::int64_t first = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  for (std::int64_t i = p.cu_router_rows[b]; i < p.cu_router_rows[b + 1]; ++i) {
    if (p.router_rows[i] < first || p.router_rows[i] >= end) {
      check.fail(at("router_rows", i) + " is " + std::to_string(p.router_rows[i]) + ", expected a row of sequence " +
                 std::to_string(b) + ", " + std::to_string(first) + " to " + std::to_string(end - 1));
    }
  }
}

// Checks the content of the tensors: offsets and choices, and that images and router rows lie within their sequences.
void check_content(const Checker& check, const AdvanceLayoutParams& p) {
  const std::int64_t last_first = INT32_MAX - p.max_tokens;  // so that no position overflows
  check_offsets(check, "cu_seqlens", p.cu_seqlens, p.num_seqs, p.cu_seqlens[p.num_seqs]);
  check.range("the end of cu_seqlens", p.cu_seqlens[p.num_seqs], 0, p.max_tokens);
  check_offsets(check, "cu_images", p.images.cu_images, p.num_seqs, p.images.num_images, "num_images");
  check_offsets(check, "cu_router_rows", p.cu_router_rows, p.num_seqs, p.num_router_rows, "num_router_rows");
  check_entries(check, "first_positions", p.first_positions, p.num_seqs, 0, last_first);
  check_entries(check, "first_cache_rows", p.first_cache_rows, p.num_seqs, 0, last_first);
  check_entries(check, "kernels", p.kernels, 2 * p.num_experts, 1, kLargestKernel);
  if (p.routed) check_entries(check, "routed", p.routed, p.num_seqs, -1, p.num_experts - 1);
  if (p.forced) check_entries(check, "forced", p.forced, p.num_seqs, -1, p.num_experts - 1);
  for (std::int64_t b = 0; b < p.num_seqs; ++b) {
    check_images(check, p.images, b, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
    check_router_rows(check, p, b);
  }
}

}  // namespace

void advance_layout(const Tensor& chosen, const Tensor& experts, const Tensor& scales, const Tensor& out_cu_seqlens,
                    const Tensor& out_image_starts, const Tensor& out_grids, const Tensor& out_router_rows,
                    const Tensor& positions, const Tensor& cache_rows, const OptionalTensor& routed,
                    const OptionalTensor& probs, const OptionalTensor& forced, const Tensor& kernels,
                    std::int64_t min_visual_tokens, const Tensor& cu_seqlens, const Tensor& first_positions,
                    const Tensor& first_cache_rows, const Tensor& cu_images, const Tensor& image_starts,
                    const Tensor& grids, const Tensor& router_rows, const Tensor& cu_router_rows, Stream stream) {
  const Checker check("advance_layout", cu_seqlens);
  Dim num_seqs("num_seqs"), num_offsets("num_seqs + 1"), num_images("num_images"), num_experts("num_experts");
  Dim num_router_rows("num_router_rows"), max_tokens("max_tokens"), two("2", 2);
  check.contiguous("first_positions", first_positions, {&num_seqs}, {DType::i32});
  num_offsets.value = num_seqs + 1;
  check.contiguous("first_cache_rows", first_cache_rows, {&num_seqs}, {DType::i32})
      .contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32})
      .contiguous("cu_images", cu_images, {&num_offsets}, {DType::i32})
      .contiguous("image_starts", image_starts, {&num_images}, {DType::i32})
      .contiguous("grids", grids, {&num_images, &two}, {DType::i32})
      .contiguous("kernels", kernels, {&num_experts, &two}, {DType::i32})
      .contiguous("router_rows", router_rows, {&num_router_rows}, {DType::i32})
      .contiguous("cu_router_rows", cu_router_rows, {&num_offsets}, {DType::i32})
      .contiguous("chosen", chosen, {&num_images}, {DType::i32})
      .contiguous("experts", experts, {&num_images}, {DType::i32})
      .contiguous("scales", scales, {&num_images}, {DType::f32})
      .contiguous("out_cu_seqlens", out_cu_seqlens, {&num_offsets}, {DType::i32})
      .contiguous("out_image_starts", out_image_starts, {&num_images}, {DType::i32})
      .contiguous("out_grids", out_grids, {&num_images, &two}, {DType::i32})
      .contiguous("out_router_rows", out_router_rows, {&num_router_rows}, {DType::i32})
      .contiguous("positions", positions, {&max_tokens}, {DType::i32})
      .contiguous("cache_rows", cache_rows, {&max_tokens}, {DType::i32})
      .range("num_experts", num_experts, 1, INT32_MAX)
      .condition(!routed == !probs, "routed and probs must be given together");
  if (routed) check.contiguous("routed", *routed, {&num_seqs}, {DType::i32});
  if (probs) check.contiguous("probs", *probs, {&num_seqs, &num_experts}, {DType::f32});
  if (forced) check.contiguous("forced", *forced, {&num_seqs}, {DType::i32});
  // The next layout is computed from all of this one, so no tensor of this one may be overwritten.
  check.no_overlap({{"out_cu_seqlens", &out_cu_seqlens},
                    {"out_image_starts", &out_image_starts},
                    {"out_grids", &out_grids},
                    {"out_router_rows", &out_router_rows},
                    {"positions", &positions},
                    {"cache_rows", &cache_rows}},
                   {{"cu_seqlens", &cu_seqlens},
                    {"first_positions", &first_positions},
                    {"first_cache_rows", &first_cache_rows},
                    {"cu_images", &cu_images},
                    {"image_starts", &image_starts},
                    {"grids", &grids},
                    {"router_rows", &router_rows},
                    {"cu_router_rows", &cu_router_rows}});
  const AdvanceLayoutParams params{.routed = as_or_null<std::int32_t>(routed),
                                   .probs = as_or_null<float>(probs),
                                   .forced = as_or_null<std::int32_t>(forced),
                                   .kernels = kernels.as<std::int32_t>(),
                                   .num_experts = num_experts,
                                   .min_visual_tokens = min_visual_tokens,
                                   .cu_seqlens = cu_seqlens.as<std::int32_t>(),
                                   .first_positions = first_positions.as<std::int32_t>(),
                                   .first_cache_rows = first_cache_rows.as<std::int32_t>(),
                                   .images = {.cu_images = cu_images.as<std::int32_t>(),
                                              .starts = image_starts.as<std::int32_t>(),
                                              .grids = grids.as<std::int32_t>(),
                                              .num_images = num_images},
                                   .router_rows = router_rows.as<std::int32_t>(),
                                   .cu_router_rows = cu_router_rows.as<std::int32_t>(),
                                   .chosen = chosen.as<std::int32_t>(),
                                   .experts = experts.as<std::int32_t>(),
                                   .scales = scales.as<float>(),
                                   .out_cu_seqlens = out_cu_seqlens.as<std::int32_t>(),
                                   .out_image_starts = out_image_starts.as<std::int32_t>(),
                                   .out_grids = out_grids.as<std::int32_t>(),
                                   .out_router_rows = out_router_rows.as<std::int32_t>(),
                                   .positions = positions.as<std::int32_t>(),
                                   .cache_rows = cache_rows.as<std::int32_t>(),
                                   .num_seqs = num_seqs,
                                   .num_router_rows = num_router_rows,
                                   .max_tokens = max_tokens};
  if (check.can_read()) check_content(check, params);
  run(params, cu_seqlens, stream);
}

}  // namespace dpn
