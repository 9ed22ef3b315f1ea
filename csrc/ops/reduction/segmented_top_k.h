// The largest scores of each segment, as ascending indices. Nothing is sorted: the kernels find the smallest kept score
// digit by digit, then write the kept indices in one pass.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

constexpr std::int64_t kMostScores = 65536;  // of a segment

struct SegmentedTopKParams {
  std::int32_t* out;              // [num_kept] relative to the segment's first score
  const float* scores;            // [num_scores]
  const std::int32_t* cu_scores;  // [num_segments + 1]
  const std::int32_t* cu_kept;    // [num_segments + 1]
  std::int64_t num_scores;
  std::int64_t num_segments;
};

void segmented_top_k(const Tensor& out, const Tensor& scores, const Tensor& cu_scores, const Tensor& cu_kept,
                     Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(segmented_top_k_kernel, SegmentedTopKParams)
DPN_DECLARE_CUDA_KERNEL(segmented_top_k_kernel, SegmentedTopKParams)
