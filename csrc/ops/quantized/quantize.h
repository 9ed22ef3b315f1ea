// Rows of x in 8 bits, each with a scale of its own: what products of 8-bit matrices by libraries take (W8A8).
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

// What the largest value of a row becomes. Of integers, half of the range of 8 bits, as compressed-tensors has it:
// checkpoints made with it expect their rows rounded so. Of e4m3, its largest number.
constexpr float kInt8Steps = 127.5f;
constexpr float kE4m3Largest = 448.0f;

struct QuantizeParams {
  std::uint8_t* out;  // [num_rows, columns]; rows from num_tokens on, and columns from in_features on, become 0
  float* scale;       // [num_tokens]; NaN for a row that is not finite, which becomes 0
  const void* x;      // [num_tokens, in_features], row stride x_stride
  std::int64_t num_rows;
  std::int64_t columns;
  std::int64_t num_tokens;
  std::int64_t in_features;
  std::int64_t x_stride;
  DType dtype;      // of x
  DType out_dtype;  // int8, or float8_e4m3fn
};

void quantize(const Tensor& out, const Tensor& scale, const Tensor& x, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(quantize_kernel, QuantizeParams)
DPN_DECLARE_CUDA_KERNEL(quantize_kernel, QuantizeParams)
