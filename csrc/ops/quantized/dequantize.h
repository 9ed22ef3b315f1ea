// What sums of a product of 8-bit rows and an 8-bit matrix stand for: times both scales, plus bias, and an activation.
#pragma once

#include <optional>
#include <string>

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"
#include "ops/activation/activation.h"

namespace dpn {

struct DequantizeParams {
  void* out;               // [num_tokens, out_features]
  const void* sums;        // [>= num_tokens, columns], columns >= out_features
  const float* row_scale;  // [num_tokens]
  const float* scale;      // [out_features]
  const void* bias;        // [out_features], or null
  std::int64_t num_tokens;
  std::int64_t out_features;
  std::int64_t columns;
  ActivationKind kind;
  DType sums_dtype;  // int32 or float32
  DType dtype;       // of out and bias
};

void dequantize(const Tensor& out, const Tensor& sums, const Tensor& row_scale, const Tensor& scale,
                const OptionalTensor& bias, const std::optional<std::string>& kind, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(dequantize_kernel, DequantizeParams)
DPN_DECLARE_CUDA_KERNEL(dequantize_kernel, DequantizeParams)
