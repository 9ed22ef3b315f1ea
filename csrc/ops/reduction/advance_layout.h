// Computes the layout of the next stage from the experts of a boundary, on the device that holds the experts. Only the
// new number of rows has to be read back from the GPU.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"
#include "ops/reduction/images.h"

namespace dpn {

struct AdvanceLayoutParams {
  // The boundary.
  const std::int32_t* routed;   // [num_seqs] experts that the router chose; null without a router
  const float* probs;           // [num_seqs, num_experts] of the router; null without a router
  const std::int32_t* forced;   // [num_seqs] expert to take, -1 where the router decides; null: -1 for all
  const std::int32_t* kernels;  // [num_experts, 2]: height, width
  std::int64_t num_experts;
  std::int64_t min_visual_tokens;  // images with fewer are skipped
  // The layout of this stage.
  const std::int32_t* cu_seqlens;        // [num_seqs + 1]
  const std::int32_t* first_positions;   // [num_seqs] position of each sequence's first row
  const std::int32_t* first_cache_rows;  // [num_seqs] cache row of each sequence's first row
  Images images;
  const std::int32_t* router_rows;     // [num_router_rows] indices of packed rows
  const std::int32_t* cu_router_rows;  // [num_seqs + 1]
  // The outputs. A sequence's choice applies to each of its images.
  std::int32_t* chosen;            // [num_images] expert chosen, -1 where the image is skipped
  std::int32_t* experts;           // [num_images] argument of pool: as chosen, but -1 where the kernel is too large
  float* scales;                   // [num_images] argument of pool: probability of the expert; 1 without a router
  std::int32_t* out_cu_seqlens;    // [num_seqs + 1]; its end is the number of rows of the next stage
  std::int32_t* out_image_starts;  // [num_images]
  std::int32_t* out_grids;         // [num_images, 2]
  std::int32_t* out_router_rows;   // [num_router_rows] indices of packed rows of the next stage
  std::int32_t* positions;         // [max_tokens] rotary position of each row of the next stage, 0 after the last
  std::int32_t* cache_rows;        // [max_tokens] cache row of each row of the next stage, 0 after the last
  std::int64_t num_seqs;
  std::int64_t num_router_rows;
  std::int64_t max_tokens;
};

// routed and probs are given together or are both null.
void advance_layout(const Tensor& chosen, const Tensor& experts, const Tensor& scales, const Tensor& out_cu_seqlens,
                    const Tensor& out_image_starts, const Tensor& out_grids, const Tensor& out_router_rows,
                    const Tensor& positions, const Tensor& cache_rows, const OptionalTensor& routed,
                    const OptionalTensor& probs, const OptionalTensor& forced, const Tensor& kernels,
                    std::int64_t min_visual_tokens, const Tensor& cu_seqlens, const Tensor& first_positions,
                    const Tensor& first_cache_rows, const Tensor& cu_images, const Tensor& image_starts,
                    const Tensor& grids, const Tensor& router_rows, const Tensor& cu_router_rows, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(advance_layout_kernel, AdvanceLayoutParams)
DPN_DECLARE_CUDA_KERNEL(advance_layout_kernel, AdvanceLayoutParams)
