#include "core/cuda_launch.cuh"
#include "core/cuda_ptx.cuh"
#include "core/cuda_vector.cuh"
#include "ops/activation/activation.h"
#include "ops/activation/gelu_cuda.cuh"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

// x / (1 + e^(-slope x)). For x below the clamp the true magnitude is below 1e-33; the clamp keeps -infinity from
// becoming infinity * 0. Results of 16 bits are computed with the approximate exponential and quotient, whose error is
// below 2^-16: the exact ones would take longer than the memory access.
template <class T>
__device__ float sigmoid_linear(float x, float slope) {
  const float clamped = x < -80.0f / slope ? -80.0f / slope : x;  // NaN stays NaN
  if constexpr (sizeof(T) == 2) {
    return __fdividef(clamped, 1.0f + exp2_approx(-kLog2E * slope * clamped));
  }
  return clamped / (1.0f + expf(-slope * clamped));
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, without cancellation; clamp and precision as above.
template <class T>
__device__ float gelu_tanh(float x) {
  const float clamped = x < -9.5f ? -9.5f : x;
  const float slope = clamped * clamped * 0.07135481282553577f + 1.5957691216057308f;
  if constexpr (sizeof(T) == 2) {
    return __fdividef(clamped, 1.0f + exp2_approx(-kLog2E * slope * clamped));
  }
  return clamped / (1.0f + expf(-slope * clamped));
}

template <class T, ActivationKind kKind>
__device__ float activate(float x) {
  if constexpr (kKind == ActivationKind::gelu) return gelu(x);
  if constexpr (kKind == ActivationKind::gelu_tanh) return gelu_tanh<T>(x);
  return sigmoid_linear<T>(x, kKind == ActivationKind::quick_gelu ? 1.702f : 1.0f);
}

template <class T, ActivationKind kKind, int kWidth>
__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationParams p) {
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (first >= p.size) return;
  const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride + first;
  float values[kWidth], up[kWidth];
  to_floats(values, load<kWidth>(x));
  if constexpr (kKind == ActivationKind::silu_mul) to_floats(up, load<kWidth>(x + p.size));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values[i] = activate<T, kKind>(values[i]);
    if constexpr (kKind == ActivationKind::silu_mul) values[i] *= up[i];
  }
  store(static_cast<T*>(p.out) + blockIdx.x * p.out_stride + first, from_floats<T>(values));
}

template <class T, ActivationKind kKind, int kWidth>
void run_width(const char* op, const ActivationParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(ceil_div(p.size, kThreads * kWidth)));
  launch(op, activation_kernel<T, kKind, kWidth>, grid, dim3(kThreads), 0, stream, p);
}

template <ActivationKind kKind>
void run(const char* op, const ActivationParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = p.size % kWidest<T> == 0 && is_aligned(p.x) && is_aligned(p.out) &&
                         is_aligned_stride(p.x_stride, p.dtype) && is_aligned_stride(p.out_stride, p.dtype);
    if (is_wide) return run_width<T, kKind, kWidest<T>>(op, p, stream);
    run_width<T, kKind, 1>(op, p, stream);
  });
}

}  // namespace

void activation_kernel(const ActivationParams& p, Stream stream) {
  switch (p.kind) {
    case ActivationKind::silu_mul:
      return run<ActivationKind::silu_mul>("silu_mul", p, stream);
    case ActivationKind::quick_gelu:
      return run<ActivationKind::quick_gelu>("activation", p, stream);
    case ActivationKind::gelu:
      return run<ActivationKind::gelu>("activation", p, stream);
    case ActivationKind::gelu_tanh:
      return run<ActivationKind::gelu_tanh>("activation", p, stream);
  }
}

}  // namespace dpn::cuda
