// Rounding of vectors of floats to 8 bits, and of results. Include as simd.h.
#pragma once

#include "core/simd.h"
#include "ops/quantized/quantize.h"

namespace dpn::DPN_ISA {

// The largest of the bits of `size` elements, signs cleared.
template <class Vec, class Bits>
Bits largest_bits(const void* x, std::int64_t size, Bits all_but_sign) {
  constexpr int kLanes = int{sizeof(Vec) / sizeof(Bits)};
  const char* source = static_cast<const char*>(x);
  Vec largest{};
  std::int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes, source += sizeof(Vec)) {
    Vec bits;
    std::memcpy(&bits, source, sizeof bits);
    bits &= all_but_sign;
    largest = bits > largest ? bits : largest;
  }
  Bits rest[kLanes] = {};
  if (k < size) std::memcpy(rest, source, static_cast<std::size_t>(size - k) * sizeof(Bits));
  Bits most = 0;
  for (int i = 0; i < kLanes; ++i) {
    const Bits bits = rest[i] & all_but_sign;
    most = most > bits ? most : bits;
    most = most > largest[i] ? most : largest[i];
  }
  return most;
}

// The largest absolute value, or something that is not finite if an element is: compared as integers, the bits of
// infinity and NaN are above those of all numbers.
inline float largest_magnitude(const float* x, std::int64_t size) {
  const auto bits = largest_bits<VecU, std::uint32_t>(x, size, 0x7FFFFFFF);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float largest_magnitude(const bf16* x, std::int64_t size) {
  using VecW = std::uint16_t __attribute__((vector_size(kWidth * 4)));
  return to_float(bf16{largest_bits<VecW, std::uint16_t>(x, size, 0x7FFF)});
}

// Divides by one positive number, rounded as a division is; a zero may lose its sign.
class Divider {
 public:
#if defined(__AVX512F__)
  // A division takes 16 cycles. The remainder of a rounded quotient is exact, and corrects it; the second correction
  // gives the correctly rounded one (P. Markstein, 1990), where no step leaves the range of normal numbers.
  explicit Divider(float divisor)
      : divisor_(broadcast(divisor)),
        reciprocal_(broadcast(1.0f / divisor)),
        is_corrected_(divisor > 0x1p-90f && divisor < 0x1p90f) {}

  VecF divide(VecF x) const {
    if (!is_corrected_) return x / divisor_;
    const auto d = reinterpret_cast<__m512>(divisor_), r = reinterpret_cast<__m512>(reciprocal_);
    const auto value = reinterpret_cast<__m512>(x);
    __m512 quotient = _mm512_mul_ps(value, r);
    quotient = _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, d, value), r, quotient);
    quotient = _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, d, value), r, quotient);
    return reinterpret_cast<VecF>(quotient);
  }

 private:
  VecF divisor_, reciprocal_;
  bool is_corrected_;
#else
  explicit Divider(float divisor) : divisor_(broadcast(divisor)) {}

  VecF divide(VecF x) const { return x / divisor_; }

 private:
  VecF divisor_;
#endif
};

// x / scale rounded to the nearest integer, ties to even, and clamped to -128..127: kWidth integers.
inline VecI to_integers(VecF x, const Divider& scale) {
  const VecF clamped = max(min(scale.divide(x), broadcast(127.0f)), broadcast(-128.0f));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  return reinterpret_cast<VecI>(clamped + 12582912.0f) - 0x4B400000;
}

// x / scale rounded to the nearest number of e4m3 (4 bits of exponent, 3 of mantissa), ties to even, and clamped to
// -448..448: the 8 bits of kWidth numbers.
inline VecI to_e4m3(VecF x, const Divider& scale) {
  const VecF clamped = max(min(scale.divide(x), broadcast(kE4m3Largest)), broadcast(-kE4m3Largest));
  const VecI magnitude = reinterpret_cast<VecI>(clamped) & 0x7FFFFFFF;
  // 3 bits of the mantissa are left, and the exponent's bias falls from 127 to 7.
  const VecI normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 numbers are multiples of 2^-9: adding 2^14 leaves how many in the low bits.
  const VecI small = reinterpret_cast<VecI>(reinterpret_cast<VecF>(magnitude) + 16384.0f) - 0x46800000;
  return (magnitude < 0x3C800000 ? small : normal) | ((reinterpret_cast<VecI>(x) >> 24) & 0x80);
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
