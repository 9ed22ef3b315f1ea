// RMSNorm and LayerNorm over rows, alone or fused with the residual addition before them.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

struct NormParams {
  void* out;           // [num_tokens, hidden_size]
  const void* x;       // [num_tokens, hidden_size], row stride x_stride
  void* residual;      // [num_tokens, hidden_size], or null: residual += x, and the sum is normalised
  const void* weight;  // [hidden_size]
  const void* bias;    // [hidden_size], LayerNorm only
  std::int64_t num_tokens;
  std::int64_t hidden_size;
  std::int64_t x_stride;
  float eps;
  DType dtype;
};

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps, Stream stream);
void add_rms_norm(const Tensor& out, const Tensor& x, const Tensor& residual, const Tensor& weight, float eps,
                  Stream stream);
void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, Stream stream);
void add_layer_norm(const Tensor& out, const Tensor& x, const Tensor& residual, const Tensor& weight,
                    const Tensor& bias, float eps, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(rms_norm_kernel, NormParams)
DPN_DECLARE_CPU_KERNEL(layer_norm_kernel, NormParams)
DPN_DECLARE_CUDA_KERNEL(rms_norm_kernel, NormParams)
DPN_DECLARE_CUDA_KERNEL(layer_norm_kernel, NormParams)
