// A block reads its row twice: for the largest value, then, from the caches, to round it.
#include <cuda_fp8.h>

#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/quantized/quantize.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

// Both round to the nearest, ties to even, and clamp.
struct Int8 {
  static constexpr float kLargest = kInt8Steps;
  __device__ static std::uint8_t round(float x) {
    return static_cast<std::uint8_t>(__float2int_rn(fminf(fmaxf(x, -128.0f), 127.0f)));
  }
};

struct E4m3 {
  static constexpr float kLargest = kE4m3Largest;
  __device__ static std::uint8_t round(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
};

template <class T, class Form, int kWidth>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeParams p) {
  __shared__ int partial[kWarpSize];
  const std::int64_t row = blockIdx.x;
  const bool is_padding = row >= p.num_tokens;
  const int size = is_padding ? 0 : static_cast<int>(p.in_features), columns = static_cast<int>(p.columns);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const int first = static_cast<int>(threadIdx.x) * kWidth;

  // Compared as integers, the bits of infinity and NaN are above those of all numbers.
  int largest = 0;
  for (int i = first; i < size; i += kThreads * kWidth) {
    float values[kWidth];
    to_floats(values, load<kWidth>(x + i));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) largest = max(largest, __float_as_int(values[j]) & 0x7FFFFFFF);
  }
  const float scale = __int_as_float(block_max(largest, partial, kThreads / kWarpSize)) / Form::kLargest;
  const float zero_or_nan = scale - scale;
  if (threadIdx.x == 0 && !is_padding) p.scale[row] = scale + zero_or_nan;

  const bool has_values = scale > 0.0f && zero_or_nan == 0.0f;
  for (int i = first; i < columns; i += kThreads * kWidth) {
    Vector<std::uint8_t, kWidth> rounded = {};
    if (i < size && has_values) {
      float values[kWidth];
      to_floats(values, load<kWidth>(x + i));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) rounded.elements[j] = Form::round(values[j] / scale);
    }
    store(p.out + row * p.columns + i, rounded);
  }
}

template <class T, class Form>
void run(const QuantizeParams& p, Stream stream) {
  constexpr int kWide = kWidest<T>;
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  const bool is_wide = p.in_features % kWide == 0 && p.columns % kWide == 0 && is_aligned(p.x) && is_aligned(p.out) &&
                       is_aligned_stride(p.x_stride, p.dtype);
  if (is_wide) return launch("quantize", quantize_kernel<T, Form, kWide>, grid, dim3(kThreads), 0, stream, p);
  launch("quantize", quantize_kernel<T, Form, 1>, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace

void quantize_kernel(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.out_dtype == DType::i8 ? run<T, Int8>(p, stream) : run<T, E4m3>(p, stream);
  });
}

}  // namespace dpn::cuda
