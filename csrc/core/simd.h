// Vectors of DPN_VECTOR_WIDTH floats, written with the compiler's vector extension so that one source serves every
// instruction set. Include only from *_cpu.cpp files: everything here is in the namespace DPN_ISA, so code for one
// instruction set can never be linked in place of another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace dpn::DPN_ISA {

constexpr int kWidth = DPN_VECTOR_WIDTH;

using VecF = float __attribute__((vector_size(kWidth * 4)));
using VecI = std::int32_t __attribute__((vector_size(kWidth * 4)));
using VecU = std::uint32_t __attribute__((vector_size(kWidth * 4)));
using VecH = std::uint16_t __attribute__((vector_size(kWidth * 2)));

// The upper 16 bits of a float.
struct bf16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// Round to nearest even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline VecF broadcast(float x) { return x - VecF{}; }

inline VecF load(const float* source) {
  VecF value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline VecF load(const bf16* source) {
  VecH half;
  std::memcpy(&half, source, sizeof half);
  // One instruction does this conversion; gcc 12 would split it in two.
#if defined(__AVX512F__)
  const VecU wide = reinterpret_cast<VecU>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(half)));
#elif defined(__AVX2__)
  const VecU wide = reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(half)));
#else
  const VecU wide = __builtin_convertvector(half, VecU);
#endif
  return reinterpret_cast<VecF>(wide << 16);
}

inline void store(float* target, VecF value) { std::memcpy(target, &value, sizeof value); }

// The same bits with every instruction set.
inline VecH to_bf16_portably(VecF value) {
  const VecU bits = reinterpret_cast<VecU>(value);
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(value != value ? nan : rounded, VecH);
}

inline void store_portably(bf16* target, VecF value) {
  const VecH half = to_bf16_portably(value);
  std::memcpy(target, &half, sizeof half);
}

inline void store(bf16* target, VecF value) {
#if defined(__AVX512BF16__)  // one instruction, but it makes subnormal numbers zero
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
  std::memcpy(target, &half, sizeof half);
#else
  store_portably(target, value);
#endif
}

// The first `count` < kWidth elements; the others read as zero and are not written.
template <class T>
inline VecF load_partial(const T* source, int count) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, source, static_cast<std::size_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_partial(T* target, VecF value, int count) {
  T buffer[kWidth];
  store(buffer, value);
  std::memcpy(target, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

// `value` in the first `count` lanes, zero in the others.
inline VecF first_lanes(float value, int count) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < count ? value : 0.0f;
  return load(lanes);
}

inline VecF max(VecF a, VecF b) { return a > b ? a : b; }
inline VecF min(VecF a, VecF b) { return a < b ? a : b; }

template <std::size_t... Lane, class Vec>
inline auto low_half(Vec value, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(value, value, Lane...);
}

template <std::size_t... Lane, class Vec>
inline auto high_half(Vec value, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(value, value, (sizeof...(Lane) + Lane)...);
}

// Combines the lower half of the lanes with the upper half, until one is left.
template <class Vec, class Combine>
inline float reduce(Vec value, const Combine& combine) {
  constexpr auto kHalf = std::make_index_sequence<sizeof(Vec) / sizeof(float) / 2>();
  if constexpr (kHalf.size() == 1) {
    return combine(value[0], value[1]);
  } else {
    return reduce(combine(low_half(value, kHalf), high_half(value, kHalf)), combine);
  }
}

inline float reduce_sum(VecF value) {
  return reduce(value, [](auto a, auto b) { return a + b; });
}

inline float reduce_max(VecF value) {
  return reduce(value, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x with a relative error below 2e-7; 0 below -87.3, e^88.3 above, NaN stays NaN. Both branches write x as n ln 2 +
// r.
inline VecF exp(VecF x) {
#if defined(__AVX512F__)
  const auto value = reinterpret_cast<__m512>(x);
  const __mmask16 is_kept = _mm512_cmp_ps_mask(value, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);  // x >= -87.3, or NaN
  const __m512 clamped = _mm512_maskz_min_ps(0xFFFF, _mm512_set1_ps(88.3f), value);
  const __m512 n = _mm512_maskz_roundscale_ps(0xFFFF, _mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504088896f)), 0);
  const __m512 high = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), clamped);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.90465421e-9f), high);
  // e^r = 1 + r + r^2 q(r); q is the minimax polynomial, error 3e-9.
  __m512 p = _mm512_set1_ps(0.0013814467238262296f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.008368780836462975f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.04166839271783829f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.1666651964187622f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.4999999403953552f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return reinterpret_cast<VecF>(_mm512_maskz_scalef_ps(is_kept, p, n));
#else
  const VecF clamped = x > 88.3f ? broadcast(88.3f) : x;
  const VecF scaled = clamped * 1.44269504088896f;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const VecF shifted = scaled + 12582912.0f;
  const VecF whole = shifted - 12582912.0f;
  const VecF r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  VecF p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const VecF mantissa = p * (r * r) + r + 1.0f;
  const VecU exponent = (reinterpret_cast<VecU>(shifted) << 23) + (127u << 23);
  const VecF result = mantissa * reinterpret_cast<VecF>(exponent);
  return x < -87.3f ? VecF{} : result;
#endif
}

// 1 / x within two units in the last place, where both are normal numbers; NaN stays NaN.
inline VecF reciprocal(VecF x) {
#if defined(__AVX512F__)
  // A division takes 16 cycles; an estimate of 14 bits and a step of Newton's method take 3.
  const auto value = reinterpret_cast<__m512>(x), estimate = _mm512_maskz_rcp14_ps(0xFFFF, value);
  return reinterpret_cast<VecF>(
      _mm512_fmadd_ps(_mm512_fnmadd_ps(value, estimate, _mm512_set1_ps(1.0f)), estimate, estimate));
#else
  return 1.0f / x;
#endif
}

// Calls body(i, count) for vectors over [0, size); count < kWidth only at the end.
template <class Body>
inline void for_each_vector(std::int64_t size, Body&& body) {
  std::int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
  if (i < size) body(i, static_cast<int>(size - i));
}

template <class T>
inline VecF load_n(const T* source, int count) {
  return count == kWidth ? load(source) : load_partial(source, count);
}

template <class T>
inline void store_n(T* target, VecF value, int count) {
  if (count == kWidth) {
    store(target, value);
  } else {
    store_partial(target, value, count);
  }
}

}  // namespace dpn::DPN_ISA
