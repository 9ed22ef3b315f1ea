// The pooling of a boundary: replaces the visual rows of every image by fewer rows, in one pass over a packed batch.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"
#include "ops/reduction/images.h"

namespace dpn {

enum class PoolFunction { max, avg, conv };

struct PoolParams {
  void* out;                       // [num_out_tokens, hidden_size]
  const void* x;                   // [num_tokens, hidden_size], row stride x_stride
  const std::int32_t* cu_seqlens;  // [num_seqs + 1]
  Images images;
  const std::int32_t* experts;         // [num_images], -1: copy the image as it is
  const std::int32_t* kernels;         // [num_experts, 2]: height, width
  const std::int32_t* out_cu_seqlens;  // [num_seqs + 1]
  const float* scales;                 // [num_images], or null
  const void* const* conv_weights;     // per expert [kernel height * kernel width, hidden_size]; or null
  std::int64_t num_tokens;
  std::int64_t num_out_tokens;
  std::int64_t num_seqs;
  std::int64_t num_experts;
  std::int64_t hidden_size;
  std::int64_t x_stride;
  PoolFunction function;
  DType dtype;
};

void pool(const Tensor& out, const Tensor& x, const Tensor& cu_seqlens, const Tensor& cu_images,
          const Tensor& image_starts, const Tensor& grids, const Tensor& experts, const Tensor& kernels,
          const Tensor& out_cu_seqlens, const OptionalTensor& scales, const std::string& function,
          const std::optional<std::vector<Tensor>>& conv_weights, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(pool_kernel, PoolParams)
DPN_DECLARE_CUDA_KERNEL(pool_kernel, PoolParams)
