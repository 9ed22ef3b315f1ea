// Decode attention of any heads, with vectors. Include as core/simd.h.
#pragma once

#include <cstddef>
#include <cstring>

#include "ops/attention/decode_chunk.h"
#include "ops/attention/decode_partial.h"
#include "ops/attention/decode_single.h"
#include "ops/attention/decode_tile.h"

namespace dpn::DPN_ISA {

// The type in which values are multiplied.
template <class U>
struct ValueOf {
  using type = float;
};
template <>
struct ValueOf<Pair> {
  using type = bf16;
};
template <class T>
using Value = typename ValueOf<Unit<T>>::type;

inline void convert(float* target, const float* source) { *target = *source; }
inline void convert(float* target, const bf16* source) { *target = to_float(*source); }

// Attends with all heads of one sequence to a part of its keys.
template <class T>
class VectorTask {
  using U = Unit<T>;
  using V = Value<T>;

 public:
  using Element = T;

  // Bytes of a thread's memory: copies of keys and values that cannot be read in place, and the queries as units.
  static std::int64_t memory_bytes(const AttentionDecodeParams& p) {
    const std::int64_t heads = p.num_kv_heads * round_up(p.num_heads / p.num_kv_heads, kQuad);
    return 4 * round_up(p.head_dim, kRun) * (heads + 2 * kChunkKeys);
  }

  VectorTask(const TaskRows<T>& rows, std::byte* memory)
      : rows_(rows),
        heads_(rows.heads),
        head_dim_(rows.p.head_dim),
        padded_dim_(rows.padded_dim),
        k_(reinterpret_cast<U*>(memory)),
        v_(reinterpret_cast<V*>(memory + 4 * kChunkKeys * padded_dim_)),
        q_(reinterpret_cast<U*>(memory + 8 * kChunkKeys * padded_dim_)) {}

  void run() {
    for (std::int64_t kv_head = 0; kv_head < rows_.p.num_kv_heads; ++kv_head) {
      rows_.partial_of(kv_head).clear();
      if (heads_ == 1) {
        copy_query(kv_head);
        continue;
      }
      for (std::int64_t head = 0; head < heads_; head += kMostQuads * kQuad) copy_queries(kv_head, head);
    }
    CachedKeys<T>(rows_.p, rows_.task)
        .for_each_chunk([&](std::int64_t kv_head, const CachedGroup<T>* groups, int num_groups) {
          attend_chunk(kv_head, groups, num_groups);
        });
  }

 private:
  U* queries_of(std::int64_t kv_head, std::int64_t head) const {
    return q_ + (kv_head * round_up(heads_, kQuad) + head) * padded_dim_ / kUnitSize<U>;
  }
  int quads_from(std::int64_t head) const { return heads_ - head > kQuad ? kMostQuads : 1; }

  void copy_query(std::int64_t kv_head) const {
    const T* row = rows_.query(kv_head);
    U* q = queries_of(kv_head, 0);
    const std::int64_t units = padded_dim_ / kUnitSize<U>, used = head_dim_ / kUnitSize<U>;
    for (std::int64_t i = 0; i < units; ++i) q[i] = U{};
    for (std::int64_t i = 0; i < used; ++i) to_unit(q + i, row + i * kUnitSize<U>);
  }

  // Copies queries in the order that score_group reads; heads that do not exist are zero.
  void copy_queries(std::int64_t kv_head, std::int64_t first_head) const {
    const int quads = quads_from(first_head);
    U* q = queries_of(kv_head, first_head);
    for (std::int64_t i = 0; i < padded_dim_ / kUnitSize<U> * quads * kQuad; ++i) q[i] = U{};
    for (std::int64_t h = 0; h < quads * kQuad && first_head + h < heads_; ++h) {
      const T* row = rows_.query(kv_head * heads_ + first_head + h);
      for (std::int64_t unit = 0; unit < head_dim_ / kUnitSize<U>; ++unit) {
        const std::int64_t vector = (unit / kWidth * kQuad + unit % kQuad) * quads + h / kQuad;
        to_unit(q + vector * kWidth + unit % kWidth / kQuad * kQuad + h % kQuad, row + unit * kUnitSize<U>);
      }
    }
  }

  // The group in the cache if the micro-kernels can read it there, else a copy. They read whole groups of their own
  // type and whole runs.
  KeyGroup<U, V> place_group(const CachedGroup<T>& cached, int g) const {
    const auto [keys, values, next_keys, next_values, count] = cached;
    const char *next_v = reinterpret_cast<const char*>(values), *next_k = reinterpret_cast<const char*>(next_keys);
    if constexpr (sizeof(V) == sizeof(T)) {
      if (count == kGroupKeys && padded_dim_ == head_dim_) {
        return {reinterpret_cast<const U*>(keys), values, next_v, next_k, count};
      }
    }
    const std::int64_t units = padded_dim_ / kUnitSize<U>, used = head_dim_ / kUnitSize<U>;
    U* k = k_ + g * kGroupKeys * units;
    V* v = v_ + g * kGroupKeys * padded_dim_;
    const KeyGroup<U, V> group{k, v, next_v, next_k, count};
    for (std::int64_t r = 0; r < kGroupKeys; ++r, k += units, v += padded_dim_) {
      const std::int64_t valid = r < count ? 1 : 0;
      const T* key = keys + r * head_dim_;
      const T* value = values + r * head_dim_;
      if constexpr (sizeof(V) == sizeof(T)) {
        std::memcpy(k, key, static_cast<std::size_t>(valid * head_dim_) * sizeof(T));
        std::memcpy(v, value, static_cast<std::size_t>(valid * head_dim_) * sizeof(T));
      } else {
        for (std::int64_t i = 0; i < used * valid; ++i) to_unit(k + i, key + i * kUnitSize<U>);
        for (std::int64_t i = 0; i < head_dim_ * valid; ++i) convert(v + i, value + i);
      }
      for (std::int64_t i = used * valid; i < units; ++i) k[i] = U{};
      for (std::int64_t i = head_dim_ * valid; i < padded_dim_; ++i) v[i] = V{};
    }
    return group;
  }

  void attend_chunk(std::int64_t kv_head, const CachedGroup<T>* cached, int num_groups) const {
    KeyGroup<U, V> groups[kChunkGroups];
    for (int g = 0; g < num_groups; ++g) groups[g] = place_group(cached[g], g);
    if (heads_ == 1) return attend_head(groups, num_groups, kv_head);
    for (std::int64_t head = 0; head < heads_; head += kMostQuads * kQuad) {
      if (quads_from(head) == 1) {
        attend_heads<1>(groups, num_groups, kv_head, head);
      } else {
        attend_heads<2>(groups, num_groups, kv_head, head);
      }
    }
  }

  void attend_head(const KeyGroup<U, V>* groups, int num_groups, std::int64_t kv_head) const {
    alignas(64) float scores[kChunkKeys];
    alignas(64) U weights[kChunkKeys / kUnitSize<U>];
    float factor;
    const U* q = queries_of(kv_head, 0);
    for (int g = 0; g < num_groups; ++g) {
      score_group_single(scores + g * kGroupKeys, groups[g], q, padded_dim_ / kUnitSize<U>);
      for (int i = groups[g].count; i < kGroupKeys; ++i) scores[g * kGroupKeys + i] = -__builtin_inff();
    }
    const Partial partial = rows_.partial_of(kv_head);
    weigh_single(scores, weights, num_groups * kGroupKeys, rows_.p.scale * kLog2E, partial.maxima, partial.weights,
                 &factor);
    add_columns<1, 1>(groups, num_groups, partial.sums, weights, &factor);
  }

  template <int kQuads>
  void attend_heads(const KeyGroup<U, V>* groups, int num_groups, std::int64_t kv_head, std::int64_t head) const {
    alignas(64) float scores[kQuads][kChunkKeys * kQuad];
    alignas(64) U weights[kQuads][kChunkKeys * kQuad / kUnitSize<U>];
    alignas(64) float factors[kQuads * kQuad];
    const U* q = queries_of(kv_head, head);
    const std::int64_t units = padded_dim_ / kUnitSize<U>;
    for (int g = 0; g < num_groups; ++g) {
      float* group_scores = scores[0] + g * kGroupKeys * kQuad;
      score_group<kQuads>(group_scores, kChunkKeys * kQuad, groups[g], q, units);
      for (int n = 0; n < kQuads; ++n) {
        for (int i = groups[g].count * kQuad; i < kGroupKeys * kQuad; ++i) {
          group_scores[n * kChunkKeys * kQuad + i] = -__builtin_inff();
        }
      }
    }
    const Partial partial = rows_.partial_of(kv_head);
    for (int n = 0; n < kQuads; ++n) {
      const std::int64_t state = (head / kQuad + n) * kWidth;
      weigh_chunk(scores[n], weights[n], num_groups * kGroupKeys, rows_.p.scale * kLog2E, partial.maxima + state,
                  partial.weights + state, factors + n * kQuad);
    }
    constexpr int kHeads = kQuads * kQuad < kMostHeads ? kQuad : kMostHeads;
    for (int first = 0; first < kQuads * kQuad && head + first < heads_; first += kHeads) {
      add_head_values<kHeads>(groups, num_groups, partial.sums + (head + first) * padded_dim_, heads_ - head - first,
                              weights[first / kQuad], factors + first);
    }
  }

  // Processes the first `heads` of at most kHeads heads.
  template <int kHeads>
  void add_head_values(const KeyGroup<U, V>* groups, int num_groups, float* sums, std::int64_t heads, const U* weights,
                       const float* factors) const {
    if constexpr (kHeads > 4) {
      if (heads > 4) return add_columns<kHeads>(groups, num_groups, sums, weights, factors);
    }
    if (heads > 2) return add_columns<4>(groups, num_groups, sums, weights, factors);
    if (heads == 2) return add_columns<2>(groups, num_groups, sums, weights, factors);
    add_columns<1>(groups, num_groups, sums, weights, factors);
  }

  template <int kHeads, int kLane = kQuad>
  void add_columns(const KeyGroup<U, V>* groups, int num_groups, float* sums, const U* weights,
                   const float* factors) const {
    constexpr int kCols = value_columns(kHeads);
    std::int64_t column = 0;
    for (; column + kCols * kWidth <= padded_dim_; column += kCols * kWidth) {
      add_values<kHeads, kCols, kLane>(sums, padded_dim_, factors, weights, groups, num_groups, column);
    }
    if (column < padded_dim_) {
      add_values<kHeads, 2, kLane>(sums, padded_dim_, factors, weights, groups, num_groups, column);
    }
  }

  const TaskRows<T>& rows_;
  std::int64_t heads_;
  std::int64_t head_dim_;
  std::int64_t padded_dim_;
  U* k_;
  V* v_;
  U* q_;
};

}  // namespace dpn::DPN_ISA
