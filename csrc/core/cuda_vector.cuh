// Reads and writes several elements at once and converts them to float32 for computations.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "core/check.h"
#include "core/cuda_ptx.cuh"
#include "core/tensor.h"

namespace dpn::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr float kLog2E = 1.44269504088896341f;  // e^x = 2^(kLog2E x), see exp2_approx

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

// Rounds to nearest even; NaN stays NaN.
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// kSize consecutive elements, which one instruction moves.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T elements[kSize];
};

// Number of elements in a 16-byte access.
template <class T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

template <int kSize, class T>
__device__ Vector<T, kSize> load(const T* source) {
  return *reinterpret_cast<const Vector<T, kSize>*>(source);
}

template <int kSize, class T>
__device__ void store(T* target, const Vector<T, kSize>& value) {
  *reinterpret_cast<Vector<T, kSize>*>(target) = value;
}

template <class T, int kSize>
__device__ void to_floats(float (&values)[kSize], const Vector<T, kSize>& vector) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = to_float(vector.elements[i]);
}

template <class T, int kSize>
__device__ Vector<T, kSize> from_floats(const float (&values)[kSize]) {
  Vector<T, kSize> vector;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {  // in pairs, which take one instruction
    std::uint32_t pairs[kSize / 2];
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) pairs[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    std::memcpy(vector.elements, pairs, sizeof pairs);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) vector.elements[i] = from_float<T>(values[i]);
  }
  return vector;
}

// Host side.

inline bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

inline std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool is_aligned_stride(std::int64_t stride, DType dtype) { return stride * size_of(dtype) % 16 == 0; }

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

// Calls function(T{}) with the element type of a checked tensor.
template <class Function>
void dispatch_float(DType dtype, const Function& function) {
  if (dtype == DType::f32) return function(float{});
  if (dtype == DType::bf16) return function(bf16{});
  return function(f16{});
}

// The same for kernels that compute in 16 bits only.
template <class Function>
void dispatch_half(DType dtype, const Function& function) {
  if (dtype == DType::bf16) return function(bf16{});
  return function(f16{});
}

}  // namespace dpn::cuda
