// A few query rows (the heads of a group) against a chunk of cached keys and values, which are read where they lie:
// decode is bound by memory, and copies would cost more than they give. Neighbouring lanes hold neighbouring query
// heads, so the softmax over keys needs no sums across lanes, and each element of a key is broadcast once for all
// heads. Include as core/simd.h.
#pragma once

#include "core/simd_dot.h"

namespace dpn::DPN_ISA {

constexpr int kGroupKeys = 16;                     // keys of one block whose scores are computed together
constexpr int kChunkGroups = 8;                    // groups between two updates of the running maximum
constexpr int kValueAlign = 64;                    // values are read in runs of as many elements
constexpr int kScoreRows = kWidth == 16 ? 16 : 8;  // keys whose scores stay in registers
constexpr int kMostLanes = kWidth;                 // heads that are processed together
constexpr int kMostHeads = kWidth == 16 ? 8 : 4;   // of which the value sums stay in registers

constexpr int value_columns(int heads) { return kWidth == 16 ? (heads == 8 ? 2 : 4) : 2; }

// kGroupKeys rows of keys and values, valid ones first; the others are zero.
template <class U>
struct KeyGroup {
  const U* k;     // rows head_dim / kUnitSize units apart
  const void* v;  // rows `v_stride` elements apart, in the type that units are made of
  std::int64_t v_stride;
  int count;  // of valid rows
};

// The state of L heads; every vector repeats its L values.
template <int L>
struct DecodeState {
  VecF maxima;
  VecF weights;  // summed over lanes that hold the same head at the end only
};

template <int L>
struct LanesOf {
  using type __attribute__((vector_size(L * 4))) = float;
};
template <int L>
using Lanes = typename LanesOf<L>::type;
static_assert(sizeof(Lanes<4>) == 16 && sizeof(Lanes<8>) == 32);

template <int L>
inline Lanes<L> load_lanes(const float* source) {
  Lanes<L> value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

template <int L>
inline Lanes<L> dot_lanes(Lanes<L> sum, float key, const float* q) {
  return sum + load_lanes<L>(q) * key;
}

#if defined(__AVX512BF16__)
template <int L>
inline Lanes<L> dot_lanes(Lanes<L> sum, Pair key, const Pair* q) {
  int bits;
  std::memcpy(&bits, &key, sizeof bits);
  if constexpr (L == 4) {
    __m128bh heads;
    std::memcpy(&heads, q, sizeof heads);
    const auto keys = __builtin_bit_cast(__m128bh, _mm_set1_epi32(bits));
    return __builtin_bit_cast(Lanes<L>, _mm_dpbf16_ps(__builtin_bit_cast(__m128, sum), heads, keys));
  } else if constexpr (L == 8) {
    __m256bh heads;
    std::memcpy(&heads, q, sizeof heads);
    const auto keys = __builtin_bit_cast(__m256bh, _mm256_set1_epi32(bits));
    return __builtin_bit_cast(Lanes<L>, _mm256_dpbf16_ps(__builtin_bit_cast(__m256, sum), heads, keys));
  } else {
    __m512bh heads;
    std::memcpy(&heads, q, sizeof heads);
    const auto keys = __builtin_bit_cast(__m512bh, _mm512_set1_epi32(bits));
    return __builtin_bit_cast(Lanes<L>, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, sum), heads, keys));
  }
}
#endif

// scores[key, head] of a group; q is [units, L]. kUnits > 0 fixes the number of units at compile time, which makes the
// addresses of all keys constant offsets. `next` is read soon after: one cache line is prefetched per unit.
template <class U, int L, int kUnits>
inline void score_group(float* scores, const U* k, const U* q, std::int64_t num_units, const char* next) {
  const std::int64_t units = kUnits ? kUnits : num_units;
  for (int first = 0; first < kGroupKeys; first += kScoreRows) {
    Lanes<L> sums[kScoreRows] = {};
    const U* rows = k + first * units;
#pragma GCC unroll 2
    for (std::int64_t unit = 0; unit < units; ++unit) {
      __builtin_prefetch(next + unit * 64);
#pragma GCC unroll 16
      for (int r = 0; r < kScoreRows; ++r) sums[r] = dot_lanes<L>(sums[r], rows[r * units + unit], q + unit * L);
    }
    for (int r = 0; r < kScoreRows; ++r) std::memcpy(scores + (first + r) * L, &sums[r], sizeof sums[r]);
  }
}

template <class U, int L>
inline void score_group(float* scores, const U* k, const U* q, std::int64_t units, const char* next) {
  if (units * kUnitSize<U> == 64) return score_group<U, L, 64 / kUnitSize<U>>(scores, k, q, units, next);
  if (units * kUnitSize<U> == 128) return score_group<U, L, 128 / kUnitSize<U>>(scores, k, q, units, next);
  score_group<U, L, 0>(scores, k, q, units, next);
}

// Combines the lanes that hold the same head, in every one of them.
template <int L, class Combine>
inline VecF across_keys(VecF value, Combine combine) {
  for (int step = kWidth / 2; step >= L; step /= 2) {
    VecI index;
    for (int i = 0; i < kWidth; ++i) index[i] = i ^ step;
    value = combine(value, __builtin_shuffle(value, index));
  }
  return value;
}

// Two vectors of weights, lanes [key, head], as units [key / kUnitSize, head].
template <int L>
inline void store_key_units(float* target, VecF first, VecF second) {
  store(target, first);
  store(target + kWidth, second);
}

#if defined(__AVX512BF16__)
template <int L>
inline void store_key_units(Pair* target, VecF first, VecF second) {
  using Halves = std::uint16_t __attribute__((vector_size(64)));
  Halves index;
  for (int i = 0; i < 32; ++i) index[i] = static_cast<std::uint16_t>((i / (2 * L) * 2 + i % 2) * L + i / 2 % L);
  const auto halves = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const Halves pairs = __builtin_shuffle(halves, index);
  std::memcpy(target, &pairs, sizeof pairs);
}
#endif

// Turns scores [keys, L] into weights [keys / kUnitSize, L] and updates the state; `factors` [kWidth] is what earlier
// sums are to be multiplied by. `scale` includes log2(e). `keys` is a multiple of kGroupKeys.
template <class U, int L>
inline void weigh_chunk(const float* scores, U* weights, std::int64_t keys, float scale, DecodeState<L>& state,
                        float* factors) {
  VecF highest = state.maxima;
  for (std::int64_t i = 0; i < keys * L; i += kWidth) highest = max(load(scores + i), highest);
  highest = across_keys<L>(highest, [](VecF a, VecF b) { return max(a, b); });
  const VecF factor = exp2_negative<float>(state.maxima - highest, scale);
  store(factors, factor);
  VecF sum{}, other_sum{};
  for (std::int64_t i = 0; i < keys * L; i += 2 * kWidth) {
    const VecF first = exp2_negative<U>(load(scores + i) - highest, scale);
    const VecF second = exp2_negative<U>(load(scores + i + kWidth) - highest, scale);
    sum += first;
    other_sum += second;
    store_key_units<L>(weights + i / kUnitSize<U>, first, second);
  }
  state.maxima = highest;
  state.weights = state.weights * factor + (sum + other_sum);
}

// The units of two neighbouring rows of values (one row where a unit is one element), kWidth * kCols elements of each.
template <int kCols>
inline void load_values(VecF (&columns)[kCols], const float* v, std::int64_t) {
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

// sums[h, :] = sums[h, :] * factors[h] + weights[:, h] . values, for H of L heads and kCols vectors of the head
// dimension from `column` on. `next` holds the addresses of the groups that are read after these.
template <class U, class V, int L, int H, int kCols>
inline void add_values(float* sums, std::int64_t sums_stride, const float* factors, const U* weights,
                       const KeyGroup<U>* groups, int num_groups, std::int64_t column, const char* const* next,
                       std::int64_t next_offset) {
  VecF totals[H][kCols];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) totals[h][c] = load(sums + h * sums_stride + c * kWidth) * factors[h];
  }
  for (int g = 0; g < num_groups; ++g) {
    const V* v = static_cast<const V*>(groups[g].v) + column;
    const std::int64_t stride = groups[g].v_stride;
    const U* w = weights + g * (kGroupKeys / kUnitSize<U>)*L;
    const char* prefetched = next[g] + next_offset;
#pragma GCC unroll 2
    for (int key = 0; key < kGroupKeys; key += kUnitSize<U>) {
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) __builtin_prefetch(prefetched + c * 64);
      prefetched += kCols * 64;
      decltype(load_units(weights)) columns[kCols];
      load_values(columns, v + key * stride, stride);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const auto weight = broadcast_unit(w + key / kUnitSize<U> * L + h);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) totals[h][c] = dot(totals[h][c], weight, columns[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) store(sums + h * sums_stride + c * kWidth, totals[h][c]);
  }
}

}  // namespace dpn::DPN_ISA
