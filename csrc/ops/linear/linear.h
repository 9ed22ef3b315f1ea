// x W^T + b for few rows of x, bound by reading W once. Many rows are a matrix product and go to torch.
#pragma once

#include "core/cpu_isa.h"
#include "core/tensor.h"

namespace dpn {

struct LinearParams {
  void* out;           // [num_tokens, out_features]
  const void* x;       // [num_tokens, in_features], row stride x_stride
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features], or null
  void* packed_x;      // linear_scratch_bytes, aligned to 64 bytes
  std::int64_t num_tokens;
  std::int64_t in_features;
  std::int64_t out_features;
  std::int64_t x_stride;
  DType dtype;
};

// The kernel first copies x, widened at most to float32 and padded to whole vectors, into this much scratch memory.
constexpr std::int64_t linear_scratch_bytes(std::int64_t num_tokens, std::int64_t in_features) {
  return num_tokens * ((in_features + 31) / 32 * 32) * 4;
}

void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(linear_kernel, LinearParams)
