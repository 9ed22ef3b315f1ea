// Rounding of vectors of floats to 8 bits, and of results. Include as simd.h.
#pragma once

#include "core/simd.h"
#include "ops/quantized/quantize.h"

namespace dpn::DPN_ISA {

// The largest absolute value, or something that is not finite if an element is: compared as integers, the bits of
// infinity and NaN are above those of all numbers.
template <class T>
float largest_magnitude(const T* x, std::int64_t size) {
  VecI largest{};
  for_each_vector(size, [&](std::int64_t k, int count) {
    const VecI magnitude = reinterpret_cast<VecI>(load_n(x + k, count)) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  });
  std::int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = largest[i] > bits ? largest[i] : bits;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// x / scale rounded to the nearest integer, ties to even, and clamped to -128..127: kWidth integers.
inline VecI to_integers(VecF x, float scale) {
  const VecF clamped = max(min(x / scale, broadcast(127.0f)), broadcast(-128.0f));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  return reinterpret_cast<VecI>(clamped + 12582912.0f) - 0x4B400000;
}

// x / scale rounded to the nearest number of e4m3 (4 bits of exponent, 3 of mantissa), ties to even, and clamped to
// -448..448: the 8 bits of kWidth numbers.
inline VecI to_e4m3(VecF x, float scale) {
  const VecF clamped = max(min(x / scale, broadcast(kE4m3Largest)), broadcast(-kE4m3Largest));
  const VecI bits = reinterpret_cast<VecI>(clamped), magnitude = bits & 0x7FFFFFFF;
  // 3 bits of the mantissa are left, and the exponent's bias falls from 127 to 7.
  const VecI normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 numbers are multiples of 2^-9: adding 2^14 leaves how many in the low bits.
  const VecI small = reinterpret_cast<VecI>(reinterpret_cast<VecF>(magnitude) + 16384.0f) - 0x46800000;
  return (magnitude < 0x3C800000 ? small : normal) | ((bits >> 24) & 0x80);
}

// The first `count` columns, rounded to the same bits with every instruction set.
template <class T>
void store_columns(T* out, VecF value, int count) {
  T whole[kWidth];
  T* target = count == kWidth ? out : whole;
  if constexpr (sizeof(T) == sizeof(bf16)) {
    store_portably(target, value);
  } else {
    store(target, value);
  }
  if (count < kWidth) std::memcpy(out, whole, static_cast<std::size_t>(count) * sizeof(T));
}

}  // namespace dpn::DPN_ISA
