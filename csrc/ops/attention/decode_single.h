// Decode attention with one query head per key/value head, where a quad of heads would waste three of its four lanes.
// Scores are whole dot products of a key with the query, and a vector holds the score of one key per lane. Include as
// core/simd.h.
#pragma once

#include "ops/attention/decode_tile.h"

namespace dpn::DPN_ISA {

// A vector whose lane i is the sum over all lanes of vector i.
template <int kLanes = kWidth>
inline VecF sum_each(const VecF* vectors) {
  if constexpr (kLanes == 1) {
    return vectors[0];
  } else {
    // Adds the halves of two vectors and joins them into one vector, until every lane is one vector's sum.
    VecF pairs[kLanes / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) pairs[i] = fold<kLanes>(vectors[2 * i], vectors[2 * i + 1]);
    return sum_each<kLanes / 2>(pairs);
  }
}

// scores[key] of a group. q has `units` units in the order of the row.
template <class U, class V>
inline void score_group_single(float* scores, const KeyGroup<U, V>& group, const U* q, std::int64_t units) {
  for (int first = 0; first < kGroupKeys; first += kWidth) {
    VecF sums[kWidth] = {};
    for (std::int64_t unit = 0; unit < units; unit += kWidth) {
      const auto query = load_units(q + unit);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        const std::int64_t offset = (first + r) * units + unit;
        prefetch(group.next_v + offset * 4);
        prefetch(group.next_k + offset * 4);
        sums[r] = dot(sums[r], load_units(group.k + offset), query);
      }
    }
    store(scores + first, sum_each(sums));
  }
}

// As weigh_chunk, for scores [keys] and weights [keys / kUnitSize]. Every lane of maxima is the running maximum; the
// running weight is the sum over all lanes of weight_sums.
template <class U>
inline void weigh_single(const float* scores, U* weights, std::int64_t keys, float scale, float* maxima,
                         float* weight_sums, float* factor) {
  VecF highest = load(maxima);
  for (std::int64_t i = 0; i < keys; i += kWidth) highest = max(load(scores + i), highest);
  highest = broadcast(reduce_max(highest));
  const VecF correction = exp2_negative<float>(load(maxima) - highest, scale);
  *factor = correction[0];
  VecF sum{};
  std::int64_t i = 0;
  for (; i + 2 * kWidth <= keys; i += 2 * kWidth) {
    const VecF first = exp2_negative<U>(load(scores + i) - highest, scale);
    const VecF second = exp2_negative<U>(load(scores + i + kWidth) - highest, scale);
    sum += first + second;
    store_elements(weights + i / kUnitSize<U>, first, second);
  }
  if (i < keys) {  // where kGroupKeys keys are a single vector
    const VecF first = exp2_negative<U>(load(scores + i) - highest, scale);
    sum += first;
    alignas(64) U units[2 * kWidth / kUnitSize<U>];
    store_elements(units, first, VecF{});
    std::memcpy(weights + i / kUnitSize<U>, units, kWidth * sizeof(U) / kUnitSize<U>);
  }
  store(maxima, highest);
  store(weight_sums, load(weight_sums) * correction + sum);
}

}  // namespace dpn::DPN_ISA
