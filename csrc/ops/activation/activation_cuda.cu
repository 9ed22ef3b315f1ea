#include "core/cuda_launch.cuh"
#include "core/cuda_vector.cuh"
#include "ops/activation/activation.h"
#include "ops/activation/functions_cuda.cuh"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

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
    case ActivationKind::none:
      return;
  }
}

}  // namespace dpn::cuda
