// Activation functions over rows: SiLU of the gate times up, and the GELUs of vision towers and projectors.
#pragma once

#include <optional>
#include <string>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

// `none` is for ops that may apply one of the others to their result.
enum class ActivationKind { silu_mul, quick_gelu, gelu, gelu_tanh, none };

struct ActivationParams {
  void* out;      // [num_tokens, size], row stride out_stride
  const void* x;  // [num_tokens, size], or [num_tokens, 2 size] for silu_mul: gate, then up; row stride x_stride
  std::int64_t num_tokens;
  std::int64_t size;
  std::int64_t x_stride;
  std::int64_t out_stride;
  ActivationKind kind;
  DType dtype;
};

// Of the argument `kind`: all but none and silu_mul.
ActivationKind kind_named(const Checker& check, const std::string& kind);
// Of the argument `activation` of a product: null is none, and silu_mul is allowed too.
ActivationKind activation_named(const Checker& check, const std::optional<std::string>& activation);

void silu_mul(const Tensor& out, const Tensor& gate_up, Stream stream);
void activation(const Tensor& out, const Tensor& x, const std::string& kind, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(activation_kernel, ActivationParams)
DPN_DECLARE_CUDA_KERNEL(activation_kernel, ActivationParams)
