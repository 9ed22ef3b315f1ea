// Activation functions of one number, for kernels whose results are of type T.
#pragma once

#include "core/cuda_ptx.cuh"
#include "core/cuda_vector.cuh"

namespace dpn::cuda {

// x / (1 + e^(-slope x)). For x below the clamp the true magnitude is below 1e-33; the clamp keeps -infinity from
// becoming infinity * 0. Results of 16 bits are computed with the approximate exponential and quotient, whose error is
// below 2^-16: the exact ones would take longer than the memory access.
template <class T>
__device__ inline float sigmoid_linear(float x, float slope) {
  const float clamped = x < -80.0f / slope ? -80.0f / slope : x;  // NaN stays NaN
  if constexpr (sizeof(T) == 2) {
    return __fdividef(clamped, 1.0f + exp2_approx(-kLog2E * slope * clamped));
  }
  return clamped / (1.0f + expf(-slope * clamped));
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, without cancellation; clamp and precision as above.
template <class T>
__device__ inline float gelu_tanh(float x) {
  const float clamped = x < -9.5f ? -9.5f : x;
  const float slope = clamped * clamped * 0.07135481282553577f + 1.5957691216057308f;
  if constexpr (sizeof(T) == 2) {
    return __fdividef(clamped, 1.0f + exp2_approx(-kLog2E * slope * clamped));
  }
  return clamped / (1.0f + expf(-slope * clamped));
}

// x Phi(x), where Phi is the normal distribution function, computed as max(x, 0) - |x| Phi(-|x|): without cancellation.
// The clamp keeps infinity from becoming infinity * 0; NaN stays NaN.
__device__ inline float gelu(float x) {
  const float magnitude = fabsf(x) > 20.0f ? 20.0f : fabsf(x);
  const float tail = 0.5f * erfcf(magnitude * 0.70710678118654752f);
  return (x > 0.0f ? x : 0.0f) - magnitude * tail;
}

}  // namespace dpn::cuda
