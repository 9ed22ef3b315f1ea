// Attention of a few query rows (the heads of a group) over a chunk of cached keys and values. These are read in place:
// memory limits the speed of decode, and copies would cost more than they save. Heads are processed in fours ("quads").
// Four consecutive lanes hold a quad's scores with one key, so the softmax over keys needs no sums over consecutive
// lanes. Include as core/simd.h.
#pragma once

#include "core/simd_dot.h"
#include "ops/attention/decode_chunk.h"

namespace dpn::DPN_ISA {

constexpr int kQuad = 4;
constexpr int kMostQuads = 2;                     // quads that share one pass over the keys
constexpr int kScoreKeys = 4;                     // keys whose scores stay in registers
constexpr int kMostHeads = kWidth == 16 ? 8 : 4;  // heads whose value sums stay in registers
constexpr int kRun = 2 * kWidth;                  // elements of a run, in which keys and values are read

constexpr int value_columns(int heads) { return kWidth == 16 ? (heads == 8 ? 2 : 4) : 2; }

// kGroupKeys rows of keys and values. The valid rows come first; the others are zero.
template <class U, class V>
struct KeyGroup {
  const U* k;          // rows padded_dim / kUnitSize units apart
  const V* v;          // rows padded_dim elements apart
  const char* next_v;  // to prefetch: these values, as many bytes as the keys have,
  const char* next_k;  // and the keys that are read after them
  int count;           // number of valid rows
};

// Prefetches into the second-level cache, from which loads are fast enough. A prefetch into the first-level cache holds
// one of its few miss buffers until memory answers, which halves the bandwidth of a core. A prefetch is dropped where
// no miss buffer is free, so every line is prefetched several times.
inline void prefetch(const char* line) { __builtin_prefetch(line, 0, 2); }

// Adds the two halves of each key's lanes. a has kLanes lanes per key; so has b, for the keys that follow.
template <int kLanes>
inline VecF fold(VecF a, VecF b) {
  VecI low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / (kLanes / 2) * kLanes + i % (kLanes / 2);
    high[i] = low[i] + kLanes / 2;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Four vectors, each of one key, to [key, 4]: the sums over the lanes of the same head.
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
// 4 * i + h of its vector (b, j) is unit b * kWidth + 4 * i + j of head h. Keys are loaded in the order of memory.
// Shuffles within four lanes then give each unit to the four heads; they take no time next to the products.
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

// Combines the lanes of the same head, kLanes apart; each of these lanes gets the result.
template <int kLanes, class Combine>
inline VecF across_keys(VecF value, Combine combine) {
  for (int step = kWidth / 2; step >= kLanes; step /= 2) {
    VecI index;
    for (int i = 0; i < kWidth; ++i) index[i] = i ^ step;
    value = combine(value, __builtin_shuffle(value, index));
  }
  return value;
}

// Converts two vectors of weights, lanes [key, kLanes], to units [key / kUnitSize, kLanes].
template <int kLanes>
inline void store_key_units(float* target, VecF first, VecF second) {
  store(target, first);
  store(target + kWidth, second);
}

#if defined(__AVX512BF16__)
template <int kLanes>
inline void store_key_units(Pair* target, VecF first, VecF second) {
  using Halves = std::uint16_t __attribute__((vector_size(64)));
  Halves index;
  for (int i = 0; i < 32; ++i)
    index[i] = static_cast<std::uint16_t>((i / (2 * kLanes) * 2 + i % 2) * kLanes + i / 2 % kLanes);
  const auto halves = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const Halves pairs = __builtin_shuffle(halves, index);
  std::memcpy(target, &pairs, sizeof pairs);
}
#endif

// Turns the scores [keys, kLanes] of kLanes heads into weights [keys / kUnitSize, kLanes], and updates the heads'
// running maxima and weights. These are vectors that repeat the kLanes values; weights are summed over the repetitions
// at the very end. `factors` [kLanes] are the factors for earlier sums. `scale` includes log2(e). `keys` is a multiple
// of 2 * kWidth / kLanes.
template <int kLanes = kQuad, class U>
inline void weigh_chunk(const float* scores, U* weights, std::int64_t keys, float scale, float* maxima,
                        float* weight_sums, float* factors) {
  VecF highest = load(maxima);
  for (std::int64_t i = 0; i < keys * kLanes; i += kWidth) highest = max(load(scores + i), highest);
  highest = across_keys<kLanes>(highest, [](VecF a, VecF b) { return max(a, b); });
  const VecF factor = exp2_negative<float>(load(maxima) - highest, scale);
  std::memcpy(factors, &factor, kLanes * sizeof(float));
  VecF sum{}, other_sum{};
  for (std::int64_t i = 0; i < keys * kLanes; i += 2 * kWidth) {
    const VecF first = exp2_negative<U>(load(scores + i) - highest, scale);
    const VecF second = exp2_negative<U>(load(scores + i + kWidth) - highest, scale);
    sum += first;
    other_sum += second;
    store_key_units<kLanes>(weights + i / kUnitSize<U>, first, second);
  }
  store(maxima, highest);
  store(weight_sums, load(weight_sums) * factor + (sum + other_sum));
}

// sums[h, :] = sums[h, :] * factors[h] + weights of h . values for kHeads heads and kCols vectors of the head dimension
// from `column` on. The rows of sums and values are padded_dim elements apart. Weights are [quad, key / kUnitSize,
// kLane], where kLane is 4 for the heads of a quad, or 1 for a single head.
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
