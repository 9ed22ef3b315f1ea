// AVX-512 on arrays, from the operation sections of Intel's manual. Names as in the compiler's immintrin.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef short __m256bh __attribute__((vector_size(32), may_alias));
typedef std::uint16_t __mmask16;
typedef std::uint32_t __mmask32;

// Compiled once, not at every use: kernels use some of them hundreds of times.
#define NOT_INLINED [[gnu::noinline]] inline

namespace emulation {

using Floats = float __attribute__((vector_size(64)));
using Words = std::uint32_t __attribute__((vector_size(64)));

template <class To, class From>
To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Subnormal numbers become zeros of the same sign: DAZ for operands, FTZ for results of bf16 dot products.
inline Floats flushed(Floats x) {
  const Words bits = cast<Words>(x);
  return cast<Floats>((bits & 0x7F800000u) == 0u ? bits & 0x80000000u : bits);
}

// sum + a * b, rounded once: the product of two bf16 is exact in float32, unless it is subnormal, where the sum can be
// off by a unit of the smallest normal number.
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return flushed(sum + a * b); }

// The first and the second element of every pair of bf16.
inline Floats first_of(Words pairs) { return flushed(cast<Floats>(pairs << 16)); }
inline Floats second_of(Words pairs) { return flushed(cast<Floats>(pairs & 0xFFFF0000u)); }

// Round to nearest even; subnormal numbers become zero, NaN stays NaN.
inline std::uint16_t to_bf16(float x) {
  const auto bits = cast<std::uint32_t>(x);
  if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7F800000u) == 0) return static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

inline __m512i _mm512_loadu_si512(const void* source) {
  __m512i value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void _mm512_storeu_si512(void* target, __m512i value) { std::memcpy(target, &value, sizeof value); }

inline void _mm512_storeu_ps(void* target, __m512 value) { std::memcpy(target, &value, sizeof value); }

// Past the caches, of which there are none here. A processor refuses addresses between lines.
inline void _mm512_stream_si512(void* target, __m512i value) {
  if (reinterpret_cast<std::uintptr_t>(target) % sizeof value != 0) std::abort();
  std::memcpy(target, &value, sizeof value);
}
inline void _mm_sfence() {}

NOT_INLINED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* source) {
  std::uint16_t lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const char*>(source) + 2 * i, 2);
  }
  return _mm512_loadu_si512(lanes);
}

inline __m512i _mm512_set1_epi32(int value) {
  return emulation::cast<__m512i>(emulation::Words{} + static_cast<std::uint32_t>(value));
}

NOT_INLINED __m512i _mm512_maskz_cvtepu16_epi32(__mmask16 mask, __m256i source) {
  std::uint16_t halves[16];
  std::memcpy(halves, &source, sizeof halves);
  std::uint32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = mask >> i & 1 ? halves[i] : 0;
  return _mm512_loadu_si512(lanes);
}

// Each quarter is shuffled in the same way.
NOT_INLINED __m512 _mm512_maskz_permute_ps(__mmask16 mask, __m512 a, int control) {
  __m512 result = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) result[i] = a[i / 4 * 4 + (control >> 2 * (i % 4) & 3)];
  }
  return result;
}

// Two quarters of a, then two of b.
NOT_INLINED __m512 _mm512_maskz_shuffle_f32x4(__mmask16 mask, __m512 a, __m512 b, int control) {
  __m512 result = {};
  for (int i = 0; i < 16; ++i) {
    const int source = (control >> 2 * (i / 4) & 3) * 4 + i % 4;
    if (mask >> i & 1) result[i] = i < 8 ? a[source] : b[source];
  }
  return result;
}

inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }

inline __m512 _mm512_set1_ps(float value) { return value - __m512{}; }

// More exact than the processor's 14 bits.
inline __m512 _mm512_maskz_rcp14_ps(__mmask16, __m512 x) { return 1.0f / x; }

// The second operand if one is NaN.
inline __m512 _mm512_maskz_min_ps(__mmask16, __m512 a, __m512 b) { return a < b ? a : b; }

// To the nearest integers, ties to even, as control 0 has it.
NOT_INLINED __m512 _mm512_maskz_roundscale_ps(__mmask16, __m512 x, int) {
  __m512 result;
  for (int i = 0; i < 16; ++i) result[i] = std::nearbyint(x[i]);
  return result;
}

// x * 2^n, where n is rounded down; finite, or NaN.
NOT_INLINED __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 x, __m512 n) {
  __m512 result = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) result[i] = n[i] != n[i] ? n[i] : std::ldexp(x[i], static_cast<int>(std::floor(n[i])));
  }
  return result;
}

#ifndef _MM_FROUND_TO_NEG_INF
#define _MM_FROUND_TO_NEG_INF 0x01
#endif
// x less the next integer below it, rounded down too, as control 1 has it; 0 where x is infinite.
NOT_INLINED __m512 _mm512_maskz_reduce_ps(__mmask16, __m512 x, int) {
  __m512 result;
  for (int i = 0; i < 16; ++i) {
    const double exact = static_cast<double>(x[i]) - std::floor(static_cast<double>(x[i]));
    const float rest = exact == 0 ? -0.0f : static_cast<float>(exact);
    result[i] = std::isinf(x[i]) ? 0.0f : rest > exact || rest == 1 ? std::nextafter(rest, 0.0f) : rest;
  }
  return result;
}

#ifndef _CMP_NLT_UQ
#define _CMP_NLT_UQ 0x15
#endif
// The one comparison that kernels use: not less, or NaN.
NOT_INLINED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {
  int mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (a[i] < b[i] ? 0 : 1) << i;
  return static_cast<__mmask16>(mask);
}

// Rounded once.
NOT_INLINED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  __m512 result;
  for (int i = 0; i < 16; ++i) result[i] = std::fma(a[i], b[i], c[i]);
  return result;
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }

NOT_INLINED __m256bh _mm512_cvtneps_pbh(__m512 x) {
  __m256bh result;
  for (int i = 0; i < 16; ++i) result[i] = static_cast<short>(emulation::to_bf16(x[i]));
  return result;
}

// The lower half is from b.
NOT_INLINED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  __m512bh result;
  for (int i = 0; i < 32; ++i) result[i] = static_cast<short>(emulation::to_bf16(i < 16 ? b[i] : a[i - 16]));
  return result;
}

// The second elements are added first.
NOT_INLINED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  using namespace emulation;
  const Words x = cast<Words>(a), y = cast<Words>(b);
  const Floats second = multiply_add(flushed(cast<Floats>(sum)), second_of(x), second_of(y));
  return cast<__m512>(multiply_add(second, first_of(x), first_of(y)));
}

// Unsigned bytes of a times signed bytes of b; sums wrap around.
NOT_INLINED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  using namespace emulation;
  using Signed = std::int32_t __attribute__((vector_size(64)));
  const Words x = cast<Words>(a);
  Words total = cast<Words>(sum);
  for (int i = 0; i < 4; ++i) {
    total += (x >> 8 * i & 0xFFu) * cast<Words>(cast<Signed>(cast<Words>(b) << (24 - 8 * i)) >> 24);
  }
  return cast<__m512i>(total);
}

NOT_INLINED __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  using namespace emulation;
  using Signed = std::int32_t __attribute__((vector_size(64)));
  const Signed low_a = cast<Signed>(cast<Words>(a) << 16) >> 16, high_a = cast<Signed>(a) >> 16;
  const Signed low_b = cast<Signed>(cast<Words>(b) << 16) >> 16, high_b = cast<Signed>(b) >> 16;
  return cast<__m512i>(cast<Words>(low_a * low_b) + cast<Words>(high_a * high_b));
}
