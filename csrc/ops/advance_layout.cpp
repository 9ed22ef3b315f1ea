#include "ops/advance_layout.h"

#include "core/check.h"

namespace dpn {

void advance_layout(const Tensor& chosen, const Tensor& experts, const Tensor& scales, const Tensor& out_cu_seqlens,
                    const Tensor& out_grids, const Tensor& out_router_rows, const Tensor& positions,
                    const Tensor* routed, const Tensor* probs, const Tensor* forced, const Tensor& kernels,
                    std::int64_t min_visual_tokens, const Tensor& cu_seqlens, const Tensor& first_rows,
                    const Tensor& image_start, const Tensor& grids, const Tensor& router_rows,
                    const Tensor& cu_router_rows, Stream stream) {
  const Checker check("advance_layout", grids);
  check.on_cuda("grids", grids);
  Dim num_seqs("num_seqs"), num_offsets("num_seqs + 1"), num_experts("num_experts"), two("2", 2);
  Dim num_router_rows("num_router_rows"), max_tokens("max_tokens");
  check.contiguous("grids", grids, {&num_seqs, &two}, {DType::i32});
  num_offsets.value = num_seqs + 1;
  check.contiguous("kernels", kernels, {&num_experts, &two}, {DType::i32})
      .contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32})
      .contiguous("first_rows", first_rows, {&num_seqs}, {DType::i32})
      .contiguous("image_start", image_start, {&num_seqs}, {DType::i32})
      .contiguous("router_rows", router_rows, {&num_router_rows}, {DType::i32})
      .contiguous("cu_router_rows", cu_router_rows, {&num_offsets}, {DType::i32})
      .contiguous("chosen", chosen, {&num_seqs}, {DType::i32})
      .contiguous("experts", experts, {&num_seqs}, {DType::i32})
      .contiguous("scales", scales, {&num_seqs}, {DType::f32})
      .contiguous("out_cu_seqlens", out_cu_seqlens, {&num_offsets}, {DType::i32})
      .contiguous("out_grids", out_grids, {&num_seqs, &two}, {DType::i32})
      .contiguous("out_router_rows", out_router_rows, {&num_router_rows}, {DType::i32})
      .contiguous("positions", positions, {&max_tokens}, {DType::i32})
      .range("num_experts", num_experts, 1, INT32_MAX)
      .condition(!routed == !probs, "routed and probs must be given together");
  if (routed) check.contiguous("routed", *routed, {&num_seqs}, {DType::i32});
  if (probs) check.contiguous("probs", *probs, {&num_seqs, &num_experts}, {DType::f32});
  if (forced) check.contiguous("forced", *forced, {&num_seqs}, {DType::i32});
  // The next layout is computed from all of this one: nothing of it may be written over.
  for (const auto& [name, out] : {std::pair{"out_cu_seqlens", &out_cu_seqlens},
                                  {"out_grids", &out_grids},
                                  {"out_router_rows", &out_router_rows},
                                  {"positions", &positions}}) {
    check.no_overlap(name, *out, "cu_seqlens", cu_seqlens)
        .no_overlap(name, *out, "first_rows", first_rows)
        .no_overlap(name, *out, "image_start", image_start)
        .no_overlap(name, *out, "grids", grids)
        .no_overlap(name, *out, "router_rows", router_rows)
        .no_overlap(name, *out, "cu_router_rows", cu_router_rows);
  }
  const AdvanceLayoutParams params{.routed = routed ? routed->as<std::int32_t>() : nullptr,
                                   .probs = probs ? probs->as<float>() : nullptr,
                                   .forced = forced ? forced->as<std::int32_t>() : nullptr,
                                   .kernels = kernels.as<std::int32_t>(),
                                   .num_experts = num_experts,
                                   .min_visual_tokens = min_visual_tokens,
                                   .cu_seqlens = cu_seqlens.as<std::int32_t>(),
                                   .first_rows = first_rows.as<std::int32_t>(),
                                   .image_start = image_start.as<std::int32_t>(),
                                   .grids = grids.as<std::int32_t>(),
                                   .router_rows = router_rows.as<std::int32_t>(),
                                   .cu_router_rows = cu_router_rows.as<std::int32_t>(),
                                   .chosen = chosen.as<std::int32_t>(),
                                   .experts = experts.as<std::int32_t>(),
                                   .scales = scales.as<float>(),
                                   .out_cu_seqlens = out_cu_seqlens.as<std::int32_t>(),
                                   .out_grids = out_grids.as<std::int32_t>(),
                                   .out_router_rows = out_router_rows.as<std::int32_t>(),
                                   .positions = positions.as<std::int32_t>(),
                                   .num_seqs = num_seqs,
                                   .num_router_rows = num_router_rows,
                                   .max_tokens = max_tokens};
  DPN_CALL_CUDA_KERNEL(advance_layout_kernel, params, grids, stream)
}

}  // namespace dpn
