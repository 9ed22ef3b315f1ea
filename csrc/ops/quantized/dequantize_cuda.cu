#include "core/cuda_launch.cuh"
#include "core/cuda_vector.cuh"
#include "ops/activation/functions_cuda.cuh"
#include "ops/quantized/dequantize.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWide = 4;  // 16 bytes of sums and scales

template <class T>
__device__ float activate(float x, ActivationKind kind) {
  switch (kind) {
    case ActivationKind::quick_gelu:
      return sigmoid_linear<T>(x, 1.702f);
    case ActivationKind::gelu:
      return gelu(x);
    case ActivationKind::gelu_tanh:
      return gelu_tanh<T>(x);
    default:
      return x;
  }
}

// Products and sum are rounded one by one, as on the CPU: the compiler would fuse them.
template <class Sum, class T, int kWidth>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (first >= p.out_features) return;
  const std::int64_t row = blockIdx.x;
  const Vector<Sum, kWidth> sums = load<kWidth>(static_cast<const Sum*>(p.sums) + row * p.columns + first);
  const Vector<float, kWidth> scale = load<kWidth>(p.scale + first);
  const float row_scale = p.row_scale[row];
  float bias[kWidth] = {}, values[kWidth];
  if (p.bias) to_floats(bias, load<kWidth>(static_cast<const T*>(p.bias) + first));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float scaled = __fmul_rn(__fmul_rn(static_cast<float>(sums.elements[i]), row_scale), scale.elements[i]);
    values[i] = activate<T>(__fadd_rn(scaled, bias[i]), p.kind);
  }
  store(static_cast<T*>(p.out) + row * p.out_features + first, from_floats<T>(values));
}

template <class Sum, class T, int kWidth>
void run_width(const DequantizeParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.num_tokens),
                  static_cast<unsigned>(ceil_div(p.out_features, kThreads * kWidth)));
  launch("dequantize", dequantize_kernel<Sum, T, kWidth>, grid, dim3(kThreads), 0, stream, p);
}

template <class Sum, class T>
void run(const DequantizeParams& p, Stream stream) {
  const bool is_wide = p.out_features % kWide == 0 && p.columns % kWide == 0 && is_aligned(p.out) &&
                       is_aligned(p.sums) && is_aligned(p.scale) && is_aligned(p.bias);
  is_wide ? run_width<Sum, T, kWide>(p, stream) : run_width<Sum, T, 1>(p, stream);
}

}  // namespace

void dequantize_kernel(const DequantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.sums_dtype == DType::i32 ? run<int, T>(p, stream) : run<float, T>(p, stream);
  });
}

}  // namespace dpn::cuda
