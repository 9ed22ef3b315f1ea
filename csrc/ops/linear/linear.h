// x W^T + b for few rows of x, where reading W takes most of the time. Products of many rows are torch's.
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

// Bytes of scratch memory. The kernel copies x there, padded to whole vectors and widened to float32 at most.
constexpr std::int64_t linear_scratch_bytes(std::int64_t num_tokens, std::int64_t in_features) {
  return num_tokens * ((in_features + 31) / 32 * 32) * 4;
}

void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(linear_kernel, LinearParams)
