// Dot products of 4 consecutive columns: uint8 weights of kWidth rows times int8 activations of one row, added to
// int32 sums. Exact with every instruction set, and sums wrap around instead of saturating. Include as simd.h.
#pragma once

#include "core/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dpn::DPN_ISA {

// Bytes of kWidth rows, 4 columns each: lane n holds row n.
inline VecU load_quads(const std::uint8_t* source) {
  VecU value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

#if defined(__AVX512VNNI__)

struct Dot4 {
  using Activations = std::uint32_t;  // 4 columns of one row
  using Weights = VecU;
  static constexpr int kSums = 24;            // vectors of sums in 32 registers
  static constexpr int kManyRowsVectors = 4;  // of weights, with which many rows are multiplied fastest

  static Activations pack(const std::int8_t* columns) {
    Activations quad;
    std::memcpy(&quad, columns, sizeof quad);
    return quad;
  }
  static Weights unpack(VecU quads) { return quads; }
  static VecU multiply_add(VecU sum, Weights weights, Activations activations) {
    return reinterpret_cast<VecU>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                      reinterpret_cast<__m512i>(weights),
                                                      _mm512_set1_epi32(static_cast<int>(activations))));
  }
};

#else

// In each lane, the products of the two pairs of int16, summed.
inline VecU multiply_pairs(VecU a, VecU b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<VecU>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecU>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const VecI low_a = reinterpret_cast<VecI>(a << 16) >> 16, high_a = reinterpret_cast<VecI>(a) >> 16;
  const VecI low_b = reinterpret_cast<VecI>(b << 16) >> 16, high_b = reinterpret_cast<VecI>(b) >> 16;
  return reinterpret_cast<VecU>(low_a * low_b + high_a * high_b);
#endif
}

// The instruction that multiplies bytes (vpmaddubsw) saturates at 16 bits, so bytes are widened first.
struct Dot4 {
  struct Activations {
    std::uint32_t even;  // columns 0 and 2 as int16
    std::uint32_t odd;   // columns 1 and 3
  };
  struct Weights {
    VecU even, odd;
  };
  static constexpr int kSums = kWidth == 16 ? 16 : 8;  // vectors of sums in 32 or 16 registers
  static constexpr int kManyRowsVectors = 2;

  static Activations pack(const std::int8_t* c) { return {pair(c[0], c[2]), pair(c[1], c[3])}; }
  static Weights unpack(VecU quads) { return {quads & 0x00FF00FFu, (quads >> 8) & 0x00FF00FFu}; }
  static VecU multiply_add(VecU sum, Weights weights, Activations activations) {
    return sum + multiply_pairs(weights.even, activations.even + VecU{}) +
           multiply_pairs(weights.odd, activations.odd + VecU{});
  }

 private:
  static std::uint32_t pair(std::int8_t low, std::int8_t high) {
    return static_cast<std::uint16_t>(low) | static_cast<std::uint32_t>(static_cast<std::uint16_t>(high)) << 16;
  }
};

#endif

}  // namespace dpn::DPN_ISA
