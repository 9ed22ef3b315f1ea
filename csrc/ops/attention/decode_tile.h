// A few query rows (the heads of a group) against a chunk of cached keys and values, which are read where they lie:
// decode is bound by memory, and copies would cost more than they give. Heads are processed in fours ("quads"); four
// neighbouring lanes hold a quad's scores with one key, so the softmax over keys needs no sums across neighbours.
// Include as core/simd.h.
#pragma once

#include "core/simd_dot.h"

namespace dpn::DPN_ISA {

constexpr int kQuad = 4;
constexpr int kMostQuads = 2;    // that share one pass over the keys
constexpr int kGroupKeys = 16;   // keys of one block whose scores are computed together
constexpr int kChunkGroups = 8;  // groups between two updates of the running maximum
constexpr int kChunkKeys = kGroupKeys * kChunkGroups;
constexpr int kScoreKeys = 4;                     // keys whose scores stay in registers
constexpr int kMostHeads = kWidth == 16 ? 8 : 4;  // whose value sums stay in registers
constexpr int kRun = 2 * kWidth;                  // keys and values are read in runs of as many elements

constexpr int value_columns(int heads) { return kWidth == 16 ? (heads == 8 ? 2 : 4) : 2; }

// kGroupKeys rows of keys and values, valid ones first; the others are zero.
template <class U, class V>
struct KeyGroup {
  const U* k;          // rows padded_dim / kUnitSize units apart
  const V* v;          // rows padded_dim elements apart
  const char* next_v;  // to prefetch, as many bytes as the keys have: these values themselves,
  const char* next_k;  // and the keys that come after them
  int count;           // of valid rows
};

// Into the second-level cache: from there the loads are quick enough, while a prefetch into the first one holds one of
// its few miss buffers until memory answers, which halves the bandwidth that a core reaches. Where no miss buffer is
// free a prefetch is dropped, so every line is prefetched several times.
inline void prefetch(const char* line) { __builtin_prefetch(line, 0, 2); }

// The halves of each key's lanes added: a has kLanes lanes a key, b as many of the keys that follow.
template <int kLanes>
inline VecF fold(VecF a, VecF b) {
  VecI low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / (kLanes / 2) * kLanes + i % (kLanes / 2);
    high[i] = low[i] + kLanes / 2;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Four vectors, each of one key, to [key, 4]: sums over the lanes that hold the same head.
inline void store_scores(float* target, VecF a, VecF b, VecF c, VecF d) {
  if constexpr (kWidth == 16) {
    store(target, fold<8>(fold<16>(a, b), fold<16>(c, d)));
  } else if constexpr (kWidth == 8) {
    store(target, fold<8>(a, b));
    store(target + 8, fold<8>(c, d));
  } else {
    store(target, a);
    store(target + 4, b);
    store(target + 8, c);
    store(target + 12, d);
  }
}

// scores[quad, key, 4] of a group, quads `quad_stride` floats apart. q is [units / kWidth, 4, kQuads, kWidth]: lane
// 4 * i + h of its vector (b, j) is unit b * kWidth + 4 * i + j of head h. Keys are loaded as they lie, and shuffles
// within four lanes, which cost nothing beside the products, give each unit to the four heads.
template <int kQuads, class U, class V>
inline void score_group(float* scores, std::int64_t quad_stride, const KeyGroup<U, V>& group, const U* q,
                        std::int64_t units) {
  for (int first = 0; first < kGroupKeys; first += kScoreKeys) {
    VecF sums[kQuads][kScoreKeys] = {};
    for (std::int64_t unit = 0; unit < units; unit += kWidth) {
      const std::int64_t offset = first * units + unit;
      decltype(load_units(q)) keys[kScoreKeys];
#pragma GCC unroll 4
      for (int r = 0; r < kScoreKeys; ++r) {
        keys[r] = load_units(group.k + offset + r * units);
        prefetch(group.next_v + (offset + r * units) * 4);
        prefetch(group.next_k + (offset + r * units) * 4);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j) {
        VecI index;
        for (int i = 0; i < kWidth; ++i) index[i] = i / kQuad * kQuad + j;
        decltype(load_units(q)) heads[kQuads];
#pragma GCC unroll 2
        for (int n = 0; n < kQuads; ++n) heads[n] = load_units(q + ((unit / kWidth * kQuad + j) * kQuads + n) * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kScoreKeys; ++r) {
          const auto key = __builtin_shuffle(keys[r], index);
#pragma GCC unroll 2
          for (int n = 0; n < kQuads; ++n) sums[n][r] = dot(sums[n][r], key, heads[n]);
        }
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kQuads; ++n) {
      store_scores(scores + n * quad_stride + first * kQuad, sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
  }
}

// Combines the lanes that hold the same head, in every one of them.
template <class Combine>
inline VecF across_keys(VecF value, Combine combine) {
  for (int step = kWidth / 2; step >= kQuad; step /= 2) {
    VecI index;
    for (int i = 0; i < kWidth; ++i) index[i] = i ^ step;
    value = combine(value, __builtin_shuffle(value, index));
  }
  return value;
}

// Two vectors of weights, lanes [key, 4], as units [key / kUnitSize, 4].
inline void store_key_units(float* target, VecF first, VecF second) {
  store(target, first);
  store(target + kWidth, second);
}

#if defined(__AVX512BF16__)
inline void store_key_units(Pair* target, VecF first, VecF second) {
  using Halves = std::uint16_t __attribute__((vector_size(64)));
  Halves index;
  for (int i = 0; i < 32; ++i)
    index[i] = static_cast<std::uint16_t>((i / (2 * kQuad) * 2 + i % 2) * kQuad + i / 2 % kQuad);
  const auto halves = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const Halves pairs = __builtin_shuffle(halves, index);
  std::memcpy(target, &pairs, sizeof pairs);
}
#endif

// Turns scores [keys, 4] into weights [keys / kUnitSize, 4] and updates the running maxima and weights of the quad
// (vectors that repeat its four values; weights are summed over the repetitions at the very end). `factors` [4] is what
// earlier sums are to be multiplied by. `scale` includes log2(e). `keys` is a multiple of kGroupKeys.
template <class U>
inline void weigh_chunk(const float* scores, U* weights, std::int64_t keys, float scale, float* maxima,
                        float* weight_sums, float* factors) {
  VecF highest = load(maxima);
  for (std::int64_t i = 0; i < keys * kQuad; i += kWidth) highest = max(load(scores + i), highest);
  highest = across_keys(highest, [](VecF a, VecF b) { return max(a, b); });
  const VecF factor = exp2_negative<float>(load(maxima) - highest, scale);
  std::memcpy(factors, &factor, kQuad * sizeof(float));
  VecF sum{}, other_sum{};
  for (std::int64_t i = 0; i < keys * kQuad; i += 2 * kWidth) {
    const VecF first = exp2_negative<U>(load(scores + i) - highest, scale);
    const VecF second = exp2_negative<U>(load(scores + i + kWidth) - highest, scale);
    sum += first;
    other_sum += second;
    store_key_units(weights + i / kUnitSize<U>, first, second);
  }
  store(maxima, highest);
  store(weight_sums, load(weight_sums) * factor + (sum + other_sum));
}

// sums[h, :] = sums[h, :] * factors[h] + weights of h . values for kHeads heads and kCols vectors of the head dimension
// from `column` on. sums and values have rows padded_dim elements apart; weights are [quad, key / kUnitSize, kLane]: 4
// heads lie side by side, or one alone.
template <int kHeads, int kCols, int kLane = kQuad, class U, class V>
inline void add_values(float* sums, std::int64_t padded_dim, const float* factors, const U* weights,
                       const KeyGroup<U, V>* groups, int num_groups, std::int64_t column) {
  static_assert(kLane == kQuad || kHeads == 1);
  constexpr int kQuadStride = kChunkKeys / kUnitSize<U> * kQuad;
  constexpr int kUnitBytes = kUnitSize<U> * static_cast<int>(sizeof(V));  // of one column
  constexpr int kAskedBytes = 4 * kCols * kWidth * kUnitBytes;            // so each line is prefetched four times
  VecF totals[kHeads][kCols];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) totals[h][c] = load(sums + h * padded_dim + column + c * kWidth) * factors[h];
  }
  for (int g = 0; g < num_groups; ++g) {
    const V* v = groups[g].v + column;
    const char* next_v = reinterpret_cast<const char*>(groups[g + 1 < num_groups ? g + 1 : g].v);
    const U* group_weights = weights + g * (kGroupKeys / kUnitSize<U>)*kLane;
#pragma GCC unroll 2
    for (int unit = 0; unit < kGroupKeys / kUnitSize<U>; ++unit) {
      decltype(load_units(weights)) columns[kCols];
      load_values(columns, v + unit * kUnitSize<U> * padded_dim, padded_dim);
      const std::int64_t asked = (unit * padded_dim + column) * kUnitBytes;
#pragma GCC unroll 16
      for (int line = 0; line < kAskedBytes; line += 64) {
        prefetch(next_v + asked + line);
        prefetch(groups[g].next_k + asked + line);
      }
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        const auto weight = broadcast_unit(group_weights + unit * kLane + h / kQuad * kQuadStride + h % kQuad);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) totals[h][c] = dot(totals[h][c], weight, columns[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) store(sums + h * padded_dim + column + c * kWidth, totals[h][c]);
  }
}

}  // namespace dpn::DPN_ISA
