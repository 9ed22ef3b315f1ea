// Decode attention of the heads of a group with AMX: scores [keys, heads] are keys, read as they lie in the cache,
// times packed queries; sums [heads, head_dim] are packed weights times values whose rows are joined to pairs. Include
// as core/tiles.h.
#pragma once

#include <cstddef>
#include <cstring>

#include "core/tiles.h"
#include "core/transpose.h"
#include "ops/attention/decode_chunk.h"
#include "ops/attention/decode_partial.h"
#include "ops/attention/decode_tile.h"

namespace dpn::DPN_ISA {

constexpr std::int64_t kStepDim = 2 * kTileSide;      // elements of the head that a product of tiles takes
constexpr std::int64_t kChunkPairs = kChunkKeys / 2;  // of keys

// Heads as columns of a tile of scores: 4, 8 or 16; 0 where VectorTask is to attend. Fewer columns leave less work for
// the softmax.
inline int amx_lanes(const AttentionDecodeParams& p) {
  const std::int64_t heads = p.num_heads / p.num_kv_heads;
  if (heads == 1 || heads > kTileSide || p.head_dim % kStepDim != 0) return 0;
  return heads <= 4 ? 4 : heads <= 8 ? 8 : 16;
}

// kGroupKeys rows of keys and values. Values of keys that do not exist are zero; their scores are to be ignored.
struct AmxGroup {
  const bf16* k;
  const bf16* v;
  const bf16* next_k;  // to prefetch
  const bf16* next_v;
  int count;  // keys that exist
};

// Attends with all heads of one sequence to a part of its keys. kLanes: see amx_lanes.
template <int kLanes>
class AmxTask {
 public:
  using Element = bf16;

  // Bytes of a thread's memory: copies of keys and values that cannot be read in place, packed values and queries.
  static std::int64_t memory_bytes(const AttentionDecodeParams& p) {
    return static_cast<std::int64_t>(sizeof(bf16)) * p.head_dim * (3 * kChunkKeys + p.num_kv_heads * kLanes);
  }

  AmxTask(const TaskRows<bf16>& rows, std::byte* memory)
      : rows_(rows),
        head_dim_(rows.p.head_dim),
        k_(reinterpret_cast<bf16*>(memory)),
        v_(k_ + kChunkKeys * head_dim_),
        packed_(reinterpret_cast<Pair*>(v_ + kChunkKeys * head_dim_)),
        q_(packed_ + kChunkPairs * head_dim_) {}

  void run() {
    constexpr TileShape kFull = ConfiguredTiles::kFull, kNarrow{kTileSide, 4 * kLanes};
    const TileShape heads{static_cast<std::uint8_t>(rows_.heads), kTileBytes};
    // Two sums of scores, queries, keys; two sums of values, weights, keys. Values go where keys went.
    const ConfiguredTiles tiles({kNarrow, kNarrow, kNarrow, kFull, heads, heads, heads, kFull});
    for (std::int64_t kv_head = 0; kv_head < rows_.p.num_kv_heads; ++kv_head) {
      rows_.partial_of(kv_head).clear();
      pack_queries(kv_head);
    }
    CachedKeys<bf16>(rows_.p, rows_.task)
        .for_each_chunk([&](std::int64_t kv_head, const CachedGroup<bf16>* groups, int num_groups) {
          attend_chunk(kv_head, groups, num_groups);
        });
    for (std::int64_t kv_head = 0; kv_head < rows_.p.num_kv_heads; ++kv_head) split_quads(rows_.partial_of(kv_head));
  }

 private:
  Pair* queries_of(std::int64_t kv_head) const { return q_ + kv_head * head_dim_ / 2 * kLanes; }

  // To [head_dim / 2, kLanes] pairs; heads that do not exist are zero.
  void pack_queries(std::int64_t kv_head) const {
    Pair* target = queries_of(kv_head);
    for (std::int64_t first = 0; first < head_dim_ / 2; first += kTileSide, target += kTileSide * kLanes) {
      VecU rows[kLanes] = {};
      for (std::int64_t h = 0; h < rows_.heads; ++h) {
        std::memcpy(&rows[h], rows_.query(kv_head * rows_.heads + h) + 2 * first, sizeof rows[h]);
      }
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) {
        for (int block = 0; block < kWidth / kLanes; ++block) {
          std::memcpy(target + (block * kLanes + i) * kLanes, reinterpret_cast<const Pair*>(&rows[i]) + block * kLanes,
                      kLanes * sizeof(Pair));
        }
      }
    }
  }

  void attend_chunk(std::int64_t kv_head, const CachedGroup<bf16>* cached, int num_groups) const {
    AmxGroup groups[kChunkGroups];
    for (int g = 0; g < num_groups; ++g) groups[g] = place_group(cached[g], g);
    if (num_groups % 2 == 1) {
      groups[num_groups] =
          place_group({cached[0].keys, cached[0].values, cached[0].keys, cached[0].values, 0}, num_groups);
      ++num_groups;
    }
    alignas(64) float scores[kChunkKeys * kLanes];
    alignas(64) Pair weights[kChunkPairs * kLanes];
    alignas(64) float factors[kLanes];
    const Pair* q = queries_of(kv_head);
    for (int g = 0; g < num_groups; g += 2) {
      score_pair(groups + g, q, scores + g * kGroupKeys * kLanes);
      // Also between products of tiles, which take long to answer.
      pack_values(groups + g, packed_ + g * kGroupKeys / 2 * head_dim_);
    }
    const Partial partial = rows_.partial_of(kv_head);
    weigh_chunk<kLanes>(scores, weights, num_groups * kGroupKeys, rows_.p.scale * kLog2E, partial.maxima,
                        partial.weights, factors);
    pack_weights(weights, num_groups);
    for (std::int64_t h = 0; h < rows_.heads; ++h) {
      if (factors[h] == 1.0f) continue;
      float* sums = partial.sums + h * head_dim_;
      for (std::int64_t i = 0; i < head_dim_; i += kWidth) store(sums + i, load(sums + i) * factors[h]);
    }
    for (std::int64_t column = 0; column < head_dim_; column += 2 * kTileSide) {
      add_values(weights, packed_ + column * kTileSide, num_groups / 2, partial.sums + column);
    }
  }

  // The group in the cache if it is whole, else a copy followed by zeros.
  AmxGroup place_group(const CachedGroup<bf16>& cached, int g) const {
    const auto [keys, values, next_keys, next_values, count] = cached;
    if (count == kGroupKeys) return {keys, values, next_keys, next_values, count};
    bf16 *k = k_ + g * kGroupKeys * head_dim_, *v = v_ + g * kGroupKeys * head_dim_;
    const std::size_t used = static_cast<std::size_t>(count * head_dim_),
                      all = kGroupKeys * static_cast<std::size_t>(head_dim_);
    for (const auto& [copy, source] : {std::pair{k, keys}, {v, values}}) {
      std::memcpy(copy, source, used * sizeof(bf16));
      std::memset(copy + used, 0, (all - used) * sizeof(bf16));
    }
    return {k, v, next_keys, next_values, count};
  }

  // scores [2 * kGroupKeys, kLanes] of two groups.
  void score_pair(const AmxGroup* groups, const Pair* q, float* scores) const {
    constexpr std::int64_t kRowBytes = 4 * kLanes;
    const std::int64_t key_bytes = head_dim_ * static_cast<std::int64_t>(sizeof(bf16));
    _tile_zero(0);
    _tile_zero(1);
    publish(q);
    for (std::int64_t i = 0; i < head_dim_; i += kStepDim, q += kTileSide * kLanes) {
      _tile_loadd(2, q, kRowBytes);
      _tile_loadd(3, groups[0].k + i, key_bytes);
      _tile_dpbf16ps(0, 3, 2);
      _tile_loadd(7, groups[1].k + i, key_bytes);
      _tile_dpbf16ps(1, 7, 2);
    }
    _tile_stored(0, scores, kRowBytes);
    _tile_stored(1, scores + kGroupKeys * kLanes, kRowBytes);
    for (int g = 0; g < 2; ++g) {
      float* group_scores = scores + g * kGroupKeys * kLanes;
      for (int i = groups[g].count * kLanes; i < kGroupKeys * kLanes; ++i) group_scores[i] = -__builtin_inff();
    }
  }

  // Of the keys of each two groups: from [pairs of keys, kLanes] to [kLanes, pairs of keys], in the order of pair_row.
  static void pack_weights(Pair* weights, int num_groups) {
    for (int step = 0; step < num_groups / 2; ++step, weights += kTileSide * kLanes) {
      VecU rows[kLanes];
      std::memcpy(rows, weights, sizeof rows);
      transpose(rows);
      std::memcpy(weights, rows, sizeof rows);
    }
  }

  // Where pack_weights puts a pair of keys of two groups.
  static constexpr std::int64_t pair_row(std::int64_t pair) {
    constexpr std::int64_t kBlocks = kWidth / kLanes;
    return pair % kBlocks * kLanes + pair / kBlocks;
  }

  // The values of two groups to [head_dim / kTileSide, row, kTileSide] pairs, and prefetches the next ones.
  void pack_values(const AmxGroup* groups, Pair* target) const {
    for (std::int64_t column = 0; column < head_dim_; column += 2 * kTileSide, target += 2 * kTileSide * kTileSide) {
#pragma GCC unroll 16
      for (int pair = 0; pair < kTileSide; ++pair) {
        constexpr int kHalf = kGroupKeys / 2;
        const AmxGroup& group = groups[pair / kHalf];
        const std::int64_t offset = 2 * (pair % kHalf) * head_dim_ + column;
        VecU columns[2];
        load_values(columns, group.v + offset, head_dim_);
        store_units(target + pair_row(pair) * kTileSide, columns[0]);
        store_units(target + (kTileSide + pair_row(pair)) * kTileSide, columns[1]);
        for (const bf16* next : {group.next_k, group.next_v}) {
          prefetch(reinterpret_cast<const char*>(next + offset));
          prefetch(reinterpret_cast<const char*>(next + offset + head_dim_));
        }
      }
    }
  }

  // Adds weights times packed values to two tiles of sums.
  void add_values(const Pair* weights, const Pair* values, int steps, float* sums) const {
    const std::int64_t sum_bytes = head_dim_ * static_cast<std::int64_t>(sizeof(float));
    publish(sums);
    _tile_loadd(4, sums, sum_bytes);
    _tile_loadd(5, sums + kTileSide, sum_bytes);
    for (int step = 0; step < steps; ++step, weights += kTileSide * kLanes, values += kTileSide * head_dim_) {
      _tile_loadd(6, weights, kTileBytes);
      _tile_loadd(3, values, kTileBytes);
      _tile_dpbf16ps(4, 6, 3);
      _tile_loadd(7, values + kTileSide * kTileSide, kTileBytes);
      _tile_dpbf16ps(5, 6, 7);
    }
    _tile_stored(4, sums, sum_bytes);
    _tile_stored(5, sums + kTileSide, sum_bytes);
  }

  // From one vector of maxima and one of weights, lanes [repetition, kLanes], to one for each quad.
  static void split_quads(const Partial& partial) {
    float maxima[kWidth], weights[kWidth];
    std::memcpy(maxima, partial.maxima, sizeof maxima);
    std::memcpy(weights, partial.weights, sizeof weights);
    for (std::int64_t i = 0; i < partial.weights - partial.maxima; ++i) {
      const std::int64_t lane = i / kWidth * kQuad + i % kQuad, repetition = i % kWidth / kQuad;
      const bool exists = repetition < kWidth / kLanes;
      partial.maxima[i] = maxima[lane];
      partial.weights[i] = exists ? weights[repetition * kLanes + lane] : 0.0f;
    }
  }

  const TaskRows<bf16>& rows_;
  std::int64_t head_dim_;
  bf16* k_;
  bf16* v_;
  Pair* packed_;  // values
  Pair* q_;
};

}  // namespace dpn::DPN_ISA
