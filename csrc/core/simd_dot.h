// Dot products over vectors of "units". A unit is four bytes: one float, or two consecutive bf16 of a row where the
// processor multiplies bf16 pairs (AVX512-BF16). Kernels written over units serve both. Include as simd.h.
#pragma once

#include "core/simd.h"

namespace dpn::DPN_ISA {

struct Pair {
  bf16 elements[2];
};

// The unit in which tensors of T are multiplied, and its number of elements.
template <class T>
struct UnitOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<bf16> {
  using type = Pair;
};
#endif
template <class T>
using Unit = typename UnitOf<T>::type;

template <class U>
constexpr int kUnitSize = 1;
template <>
inline constexpr int kUnitSize<Pair> = 2;

inline VecF load_units(const float* source) { return load(source); }
inline void store_units(float* target, VecF value) { store(target, value); }
inline VecF broadcast_unit(const float* source) { return broadcast(*source); }
inline VecF dot(VecF sum, VecF a, VecF b) { return sum + a * b; }

inline void to_unit(float* target, const float* source) { *target = *source; }
inline void to_unit(float* target, const bf16* source) { *target = to_float(*source); }

#if defined(__AVX512BF16__)
inline VecU load_units(const Pair* source) {
  VecU value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void store_units(Pair* target, VecU value) { std::memcpy(target, &value, sizeof value); }

inline VecU broadcast_unit(const Pair* source) {
  std::uint32_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits + VecU{};
}

inline VecF dot(VecF sum, VecU a, VecU b) {
  return reinterpret_cast<VecF>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

inline void to_unit(Pair* target, const bf16* source) { std::memcpy(target, source, sizeof *target); }
#endif

// Two vectors of consecutive elements.
inline void store_elements(float* target, VecF first, VecF second) {
  store(target, first);
  store(target + kWidth, second);
}

#if defined(__AVX512BF16__)
inline void store_elements(Pair* target, VecF first, VecF second) {
  const auto pairs = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  std::memcpy(target, &pairs, sizeof pairs);
}
#endif

// The units of two consecutive rows of values, kWidth * kCols elements of each: unit i holds element i of both rows.
// Where a unit is one element, only the first row is read. kCols is even.
template <int kCols, class T>
inline void load_values(VecF (&columns)[kCols], const T* v, std::int64_t) {
  for (int c = 0; c < kCols; ++c) columns[c] = load(v + c * kWidth);
}

#if defined(__AVX512BF16__)
template <int kCols>
inline void load_values(VecU (&columns)[kCols], const bf16* v, std::int64_t stride) {
  using Halves = std::uint16_t __attribute__((vector_size(64)));
  Halves low, high;
  for (int i = 0; i < 32; ++i) {
    low[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 32);
    high[i] = static_cast<std::uint16_t>(low[i] + 16);
  }
  for (int c = 0; c < kCols; c += 2) {
    Halves first, second;
    std::memcpy(&first, v + c * kWidth, sizeof first);
    std::memcpy(&second, v + stride + c * kWidth, sizeof second);
    columns[c] = (VecU)__builtin_shuffle(first, second, low);
    columns[c + 1] = (VecU)__builtin_shuffle(first, second, high);
  }
}
#endif

constexpr float kLog2E = 1.44269504088896f;

// 2^(x * scale) for x * scale <= 0; zero below -125, NaN stays NaN. The relative error is below 8e-8 for float units,
// and below 1e-4 for bf16 pairs, which keep only 3 digits. The scale is applied here, so that a difference x of large
// scores is exact.
template <class U>
inline VecF exp2_negative(VecF x, float scale) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // leaves the biased exponent of 2^round(x * scale) in the low bits
  const VecF shifted = x * scale + kMagic;
  const VecF r = x * scale - (shifted - kMagic);
  VecF p = broadcast(1.326472615e-3f) * r + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  const VecF result = p * reinterpret_cast<VecF>(reinterpret_cast<VecI>(shifted) << 23);
  return x < -125.0f / scale ? VecF{} : result;
}

#if defined(__AVX512BF16__)
template <>
inline VecF exp2_negative<Pair>(VecF x, float scale) {
  const auto exponent = reinterpret_cast<__m512>(x * scale);
  // 2^r for r from 0 to 1; scalef rounds the exponent down by itself.
  const auto r = reinterpret_cast<VecF>(_mm512_maskz_reduce_ps(0xFFFF, exponent, _MM_FROUND_TO_NEG_INF));
  VecF p = broadcast(7.706703991e-2f) * r + 2.276449949e-1f;
  p = p * r + 6.951167583e-1f;
  p = p * r + 1.0f;
  const __mmask16 is_kept = _mm512_cmp_ps_mask(exponent, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);  // or NaN
  return reinterpret_cast<VecF>(_mm512_maskz_scalef_ps(is_kept, reinterpret_cast<__m512>(p), exponent));
}
#endif

}  // namespace dpn::DPN_ISA
