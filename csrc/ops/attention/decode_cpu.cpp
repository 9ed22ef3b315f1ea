#include <cstddef>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/attention/attention.h"
#include "ops/attention/decode_partial.h"
#include "ops/attention/decode_single.h"
#include "ops/attention/decode_tile.h"

namespace dpn::DPN_ISA {

namespace {

constexpr float kLog2E = 1.44269504088896f;

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

// A thread's buffers: the queries as units, and copies of keys and values that cannot be read in place.
template <class T>
struct Copies {
  Unit<T>* q;
  Unit<T>* k;
  Value<T>* v;

  static std::int64_t bytes(std::int64_t heads, std::int64_t padded_dim) {
    return round_up(4 * padded_dim * (round_up(heads, kQuad) + 2 * kChunkKeys), 64);
  }
  Copies(std::byte* memory, std::int64_t padded_dim)
      : q(reinterpret_cast<Unit<T>*>(memory + 8 * kChunkKeys * padded_dim)),
        k(reinterpret_cast<Unit<T>*>(memory)),
        v(reinterpret_cast<Value<T>*>(memory + 4 * kChunkKeys * padded_dim)) {}
};

inline void convert(float* target, const float* source) { *target = *source; }
inline void convert(float* target, const bf16* source) { *target = to_float(*source); }

// Attends with all heads of one sequence to a part of its keys. It processes one chunk after another, and within a
// chunk one head after another: then the memory that the processor prefetches after a head's rows of a KV block is the
// next head's and is used.
template <class T>
class Task {
  using U = Unit<T>;
  using V = Value<T>;
  // Each group has up to kGroupKeys rows; offsets are those of head 0 in the cache.
  struct Chunk {
    std::int64_t offsets[kChunkGroups];
    int counts[kChunkGroups];
    int num_groups = 0;
  };

 public:
  Task(const AttentionDecodeParams& p, const DecodeTask& task, const Copies<T>& copies, float* partials)
      : p_(p),
        task_(task),
        copies_(copies),
        partials_(partials),
        heads_(p.num_heads / p.num_kv_heads),
        padded_dim_(round_up(p.head_dim, kRun)),
        key_(task.first_key),
        entry_(key_ / p.paged.block_size),
        row_(key_ % p.paged.block_size) {
    const std::int64_t plane = p.num_kv_heads * p.paged.block_size * p.head_dim;
    keys_ = static_cast<const T*>(p.paged.kv_cache) + p.paged.layer_in_block * 2 * plane;
    values_ = keys_ + plane;
    block_stride_ = p.paged.layers_per_block * 2 * plane;
  }

  void run() {
    for (std::int64_t kv_head = 0; kv_head < p_.num_kv_heads; ++kv_head) {
      const Partial partial = partial_of(kv_head);
      const std::int64_t padded_heads = round_up(heads_, kQuad);
      for (std::int64_t i = 0; i < padded_heads * padded_dim_; ++i) partial.sums[i] = 0;
      for (std::int64_t i = 0; i < padded_heads * kWidth / kQuad; ++i) {
        partial.maxima[i] = -__builtin_inff();
        partial.weights[i] = 0;
      }
      if (heads_ == 1) {
        copy_query(kv_head);
        continue;
      }
      for (std::int64_t head = 0; head < heads_; head += kMostQuads * kQuad) copy_queries(kv_head, head);
    }
    Chunk chunks[2];
    find_chunk(chunks[0]);
    for (int turn = 0; chunks[turn].num_groups > 0; turn ^= 1) {
      find_chunk(chunks[turn ^ 1]);
      for (std::int64_t kv_head = 0; kv_head < p_.num_kv_heads; ++kv_head) {
        attend_chunk(kv_head, chunks[turn], chunks[turn ^ 1]);
      }
    }
  }

 private:
  Partial partial_of(std::int64_t kv_head) const {
    return {partials_ + kv_head * Partial::size(heads_, padded_dim_), heads_, padded_dim_};
  }
  U* queries_of(std::int64_t kv_head, std::int64_t head) const {
    return copies_.q + (kv_head * round_up(heads_, kQuad) + head) * padded_dim_ / kUnitSize<U>;
  }
  int quads_from(std::int64_t head) const { return heads_ - head > kQuad ? kMostQuads : 1; }

  const T* query_row(std::int64_t head) const {
    return static_cast<const T*>(p_.q) + task_.sequence * p_.q_stride[0] + head * p_.q_stride[1];
  }

  void copy_query(std::int64_t kv_head) const {
    const T* row = query_row(kv_head);
    U* q = queries_of(kv_head, 0);
    const std::int64_t units = padded_dim_ / kUnitSize<U>, used = p_.head_dim / kUnitSize<U>;
    for (std::int64_t i = 0; i < units; ++i) q[i] = U{};
    for (std::int64_t i = 0; i < used; ++i) to_unit(q + i, row + i * kUnitSize<U>);
  }

  // Copies queries in the order that score_group reads; heads that do not exist are zero.
  void copy_queries(std::int64_t kv_head, std::int64_t first_head) const {
    const int quads = quads_from(first_head);
    U* q = queries_of(kv_head, first_head);
    for (std::int64_t i = 0; i < padded_dim_ / kUnitSize<U> * quads * kQuad; ++i) q[i] = U{};
    for (std::int64_t h = 0; h < quads * kQuad && first_head + h < heads_; ++h) {
      const T* row = query_row(kv_head * heads_ + first_head + h);
      for (std::int64_t unit = 0; unit < p_.head_dim / kUnitSize<U>; ++unit) {
        const std::int64_t vector = (unit / kWidth * kQuad + unit % kQuad) * quads + h / kQuad;
        to_unit(q + vector * kWidth + unit % kWidth / kQuad * kQuad + h % kQuad, row + unit * kUnitSize<U>);
      }
    }
  }

  // Finds the next groups, up to kChunkGroups of them; none at the end.
  void find_chunk(Chunk& chunk) {
    const std::int32_t* blocks = p_.paged.block_table + task_.sequence * p_.paged.max_blocks;
    int g = 0;
    for (; g < kChunkGroups && key_ < task_.last_key; ++g) {
      std::int64_t count = p_.paged.block_size - row_;
      if (count > task_.last_key - key_) count = task_.last_key - key_;
      if (count > kGroupKeys) count = kGroupKeys;
      chunk.offsets[g] = blocks[entry_] * block_stride_ + row_ * p_.head_dim;
      chunk.counts[g] = static_cast<int>(count);
      key_ += count;
      row_ += count;
      if (row_ == p_.paged.block_size) {
        row_ = 0;
        ++entry_;
      }
    }
    chunk.num_groups = g;
  }

  // The group in the cache if the micro-kernels can read it there, else a copy. They read whole groups of their own
  // type and whole runs.
  KeyGroup<U, V> place_group(const T* keys, const T* values, int count, int g) const {
    if constexpr (sizeof(V) == sizeof(T)) {
      if (count == kGroupKeys && padded_dim_ == p_.head_dim) {
        return {reinterpret_cast<const U*>(keys), values, nullptr, nullptr, count};
      }
    }
    const std::int64_t units = padded_dim_ / kUnitSize<U>, used = p_.head_dim / kUnitSize<U>;
    U* k = copies_.k + g * kGroupKeys * units;
    V* v = copies_.v + g * kGroupKeys * padded_dim_;
    const KeyGroup<U, V> group{k, v, nullptr, nullptr, count};
    for (std::int64_t r = 0; r < kGroupKeys; ++r, k += units, v += padded_dim_) {
      const std::int64_t valid = r < count ? 1 : 0;
      const T* key = keys + r * p_.head_dim;
      const T* value = values + r * p_.head_dim;
      if constexpr (sizeof(V) == sizeof(T)) {
        std::memcpy(k, key, static_cast<std::size_t>(valid * p_.head_dim) * sizeof(T));
        std::memcpy(v, value, static_cast<std::size_t>(valid * p_.head_dim) * sizeof(T));
      } else {
        for (std::int64_t i = 0; i < used * valid; ++i) to_unit(k + i, key + i * kUnitSize<U>);
        for (std::int64_t i = 0; i < p_.head_dim * valid; ++i) convert(v + i, value + i);
      }
      for (std::int64_t i = used * valid; i < units; ++i) k[i] = U{};
      for (std::int64_t i = p_.head_dim * valid; i < padded_dim_; ++i) v[i] = V{};
    }
    return group;
  }

  void attend_chunk(std::int64_t kv_head, const Chunk& chunk, const Chunk& next_chunk) const {
    KeyGroup<U, V> groups[kChunkGroups];
    const std::int64_t head_stride = p_.paged.block_size * p_.head_dim, offset = kv_head * head_stride;
    const bool last_head = kv_head + 1 == p_.num_kv_heads;
    for (int g = 0; g < chunk.num_groups; ++g) {
      const T* keys = keys_ + chunk.offsets[g] + offset;
      const T* values = values_ + chunk.offsets[g] + offset;
      groups[g] = place_group(keys, values, chunk.counts[g], g);
      // To prefetch: the values of these keys, and the keys that are read after them.
      groups[g].next_v = reinterpret_cast<const char*>(values);
      groups[g].next_k = reinterpret_cast<const char*>(!last_head                  ? keys + head_stride
                                                       : g < next_chunk.num_groups ? keys_ + next_chunk.offsets[g]
                                                                                   : values);
    }
    if (heads_ == 1) return attend_head(groups, chunk.num_groups, kv_head);
    for (std::int64_t head = 0; head < heads_; head += kMostQuads * kQuad) {
      if (quads_from(head) == 1) {
        attend_heads<1>(groups, chunk.num_groups, kv_head, head);
      } else {
        attend_heads<2>(groups, chunk.num_groups, kv_head, head);
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
    const Partial partial = partial_of(kv_head);
    weigh_single(scores, weights, num_groups * kGroupKeys, p_.scale * kLog2E, partial.maxima, partial.weights, &factor);
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
    const Partial partial = partial_of(kv_head);
    for (int n = 0; n < kQuads; ++n) {
      const std::int64_t state = (head / kQuad + n) * kWidth;
      weigh_chunk(scores[n], weights[n], num_groups * kGroupKeys, p_.scale * kLog2E, partial.maxima + state,
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

  const AttentionDecodeParams& p_;
  const DecodeTask& task_;
  const Copies<T>& copies_;
  float* partials_;
  std::int64_t heads_;  // query heads of a key/value head
  std::int64_t padded_dim_;
  std::int64_t key_;    // the first key that is in no chunk yet: it is
  std::int64_t entry_;  // in this entry of the block table, and
  std::int64_t row_;    // in this row of the block
  const T* keys_;       // keys of this layer in block 0
  const T* values_;
  std::int64_t block_stride_;
};

template <class T>
void decode(const AttentionDecodeParams& p) {
  const std::int64_t heads = p.num_heads / p.num_kv_heads, padded_dim = round_up(p.head_dim, kRun);
  const std::int64_t head_stride = Partial::size(heads, padded_dim), task_stride = p.num_kv_heads * head_stride;
  const std::int64_t partial_bytes = round_up(p.num_tasks * task_stride * 4, 64);
  const std::int64_t copies_bytes = Copies<T>::bytes(p.num_kv_heads * round_up(heads, kQuad), padded_dim);
  auto* memory = static_cast<std::byte*>(scratch(partial_bytes + max_threads() * copies_bytes));
  auto* partials = reinterpret_cast<float*>(memory);
  parallel_for(p.num_tasks, [&](std::int64_t task, int thread) {
    const Copies<T> copies(memory + partial_bytes + thread * copies_bytes, padded_dim);
    Task<T>(p, p.tasks[task], copies, partials + task * task_stride).run();
  });
  parallel_rows(p.num_seqs * p.num_heads, p.head_dim * 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t* first_task = p.first_task + i / p.num_heads;
      const Partial first(partials + first_task[0] * task_stride + i % p.num_heads / heads * head_stride, heads,
                          padded_dim);
      reduce<T>(static_cast<T*>(p.out) + i * p.head_dim, first, task_stride, first_task[1] - first_task[0], i % heads,
                heads, p.head_dim, padded_dim, p.scale * kLog2E);
    }
  });
}

}  // namespace

void attention_decode_kernel(const AttentionDecodeParams& p) {
  p.dtype == DType::f32 ? decode<float>(p) : decode<bf16>(p);
}

}  // namespace dpn::DPN_ISA
