#include <cstddef>

#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/attention.h"
#include "ops/attention_decode_tile.h"

namespace dpn::DPN_ISA {

namespace {

constexpr float kLog2E = 1.44269504088896f;
constexpr std::int64_t kMaxHeadDim = 256;
constexpr std::int64_t kChunkKeys = kGroupKeys * kChunkGroups;

// The type that values are multiplied in.
template <class U>
struct ValueOf {
  using type = float;
};
template <>
struct ValueOf<Pair> {
  using type = bf16;
};

// Partial result of `lanes` heads over a part of the keys: sums [lanes, padded_dim], maxima and weights [lanes].
struct Partial {
  float* sums;
  float* maxima;
  float* weights;

  static std::int64_t size(std::int64_t padded_dim, int lanes) { return round_up(lanes * (padded_dim + 2), 16); }
  Partial(float* memory, std::int64_t padded_dim, int lanes)
      : sums(memory), maxima(sums + lanes * padded_dim), weights(maxima + lanes) {}
};

// Copies of groups that cannot be read in place: fewer than kGroupKeys rows, another type, or an odd head_dim.
template <class U>
struct Staged {
  U k[kChunkKeys * kMaxHeadDim / kUnitSize<U>];
  typename ValueOf<U>::type v[kChunkKeys * kMaxHeadDim];
};

template <class T>
struct Chunk {
  using U = Unit<T>;
  KeyGroup<U> groups[kChunkGroups];
  const T* k[kChunkGroups];  // in the cache
  const T* v[kChunkGroups];
  int num_groups = 0;
};

inline void convert(float* target, const float* source) { *target = *source; }
inline void convert(float* target, const bf16* source) { *target = to_float(*source); }
inline void convert(bf16* target, const bf16* source) { *target = *source; }

template <class T>
class Task {
  using U = Unit<T>;
  using V = typename ValueOf<U>::type;
  static constexpr bool kInPlace = sizeof(T) * kUnitSize<U> == sizeof(U);

 public:
  Task(const AttentionDecodeParams& p, const DecodeTask& task, Staged<U>& staged)
      : p_(p), task_(task), staged_(staged), padded_dim_(round_up(p.head_dim, kValueAlign)) {
    const std::int64_t plane = p.num_kv_heads * p.block_size * p.head_dim;
    keys_ = static_cast<const T*>(p.kv_cache) + p.layer_in_cell * 2 * plane + task.kv_head * p.block_size * p.head_dim;
    values_ = keys_ + plane;
    cell_stride_ = p.layers_per_cell * 2 * plane;
    blocks_ = p.block_table + task.sequence * p.max_blocks;
  }

  // Heads [first_head, first_head + heads) of the group, heads <= L.
  template <int L>
  void run(std::int64_t first_head, std::int64_t heads, float* memory) {
    const Partial partial(memory, padded_dim_, L);
    alignas(64) U q[kMaxHeadDim / kUnitSize<U> * L] = {};
    load_queries<L>(q, first_head, heads);
    std::memset(partial.sums, 0, static_cast<std::size_t>(L * padded_dim_) * sizeof(float));
    DecodeState<L> state{broadcast(-__builtin_inff()), VecF{}};
    Chunk<T> chunks[2];
    std::int64_t key = next_chunk(chunks[0], task_.first_key);
    for (int turn = 0;; turn ^= 1) {
      const std::int64_t following = next_chunk(chunks[turn ^ 1], key);
      attend_chunk<L>(chunks[turn], following > key ? chunks[turn ^ 1] : chunks[turn], q, heads, state, partial);
      if (following == key) break;
      key = following;
    }
    std::memcpy(partial.maxima, &state.maxima, L * sizeof(float));
    const VecF weights = across_keys<L>(state.weights, [](VecF a, VecF b) { return a + b; });
    std::memcpy(partial.weights, &weights, L * sizeof(float));
  }

 private:
  template <int L>
  void load_queries(U* q, std::int64_t first_head, std::int64_t heads) const {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t head = task_.kv_head * (p_.num_heads / p_.num_kv_heads) + first_head + h;
      const T* row = static_cast<const T*>(p_.q) + task_.sequence * p_.q_stride[0] + head * p_.q_stride[1];
      for (std::int64_t i = 0; i < p_.head_dim / kUnitSize<U>; ++i) to_unit(q + i * L + h, row + i * kUnitSize<U>);
    }
  }

  // Finds the rows of up to kChunkGroups groups from `key` on; returns the first key after them.
  std::int64_t next_chunk(Chunk<T>& chunk, std::int64_t key) const {
    chunk.num_groups = 0;
    while (key < task_.last_key && chunk.num_groups < kChunkGroups) {
      const std::int64_t row = key % p_.block_size;
      std::int64_t count = p_.block_size - row;
      if (count > task_.last_key - key) count = task_.last_key - key;
      if (count > kGroupKeys) count = kGroupKeys;
      const std::int64_t offset = blocks_[key / p_.block_size] * cell_stride_ + row * p_.head_dim;
      const int g = chunk.num_groups++;
      chunk.k[g] = keys_ + offset;
      chunk.v[g] = values_ + offset;
      chunk.groups[g].count = static_cast<int>(count);
      key += count;
    }
    return key;
  }

  // Where the micro-kernels read the group: in the cache if they can.
  void place(Chunk<T>& chunk, int g) const {
    KeyGroup<U>& group = chunk.groups[g];
    const bool whole = kInPlace && group.count == kGroupKeys;
    if constexpr (kInPlace) {
      if (whole) group.k = reinterpret_cast<const U*>(chunk.k[g]);
      group.v = chunk.v[g];
      group.v_stride = p_.head_dim;
    }
    if (!whole) {
      U* k = staged_.k + g * kGroupKeys * p_.head_dim / kUnitSize<U>;
      group.k = k;
      const std::int64_t units = p_.head_dim / kUnitSize<U>;
      for (std::int64_t i = 0; i < group.count * units; ++i) to_unit(k + i, chunk.k[g] + i * kUnitSize<U>);
      for (std::int64_t i = group.count * units; i < kGroupKeys * units; ++i) k[i] = U{};
    }
    if (!whole || padded_dim_ != p_.head_dim) {
      V* v = staged_.v + g * kGroupKeys * padded_dim_;
      group.v = v;
      group.v_stride = padded_dim_;
      for (std::int64_t r = 0; r < kGroupKeys; ++r) {
        for (std::int64_t i = 0; i < padded_dim_; ++i) {
          if (r < group.count && i < p_.head_dim) {
            convert(v + r * padded_dim_ + i, chunk.v[g] + r * p_.head_dim + i);
          } else {
            v[r * padded_dim_ + i] = V{};
          }
        }
      }
    }
  }

  template <int L>
  void attend_chunk(Chunk<T>& chunk, const Chunk<T>& next, const U* q, std::int64_t heads, DecodeState<L>& state,
                    const Partial& partial) const {
    alignas(64) float scores[kChunkKeys * L];
    alignas(64) U weights[kChunkKeys * L / kUnitSize<U>];
    alignas(64) float factors[kWidth];
    const std::int64_t units = p_.head_dim / kUnitSize<U>;
    const char* next_keys[kChunkGroups];
    for (int g = 0; g < chunk.num_groups; ++g) {
      place(chunk, g);
      const KeyGroup<U>& group = chunk.groups[g];
      float* group_scores = scores + g * kGroupKeys * L;
      score_group<U, L>(group_scores, group.k, q, units, reinterpret_cast<const char*>(chunk.v[g]));
      for (int i = group.count * L; i < kGroupKeys * L; ++i) group_scores[i] = -__builtin_inff();
      next_keys[g] = reinterpret_cast<const char*>(next.k[g < next.num_groups ? g : 0]);
    }
    weigh_chunk<U, L>(scores, weights, chunk.num_groups * kGroupKeys, p_.scale * kLog2E, state, factors);
    for (std::int64_t first = 0; first < heads; first += kMostHeads) {
      const std::int64_t left = heads - first;
      if constexpr (kMostHeads > 4) {
        if (left > 4) {
          add_chunk_values<L, (L < kMostHeads ? L : kMostHeads)>(chunk, first, weights, factors, next_keys, partial);
          continue;
        }
      }
      if (left > 2) {
        add_chunk_values<L, 4>(chunk, first, weights, factors, next_keys, partial);
      } else if (left == 2) {
        add_chunk_values<L, 2>(chunk, first, weights, factors, next_keys, partial);
      } else {
        add_chunk_values<L, 1>(chunk, first, weights, factors, next_keys, partial);
      }
    }
  }

  template <int L, int H>
  void add_chunk_values(const Chunk<T>& chunk, std::int64_t head, const U* weights, const float* factors,
                        const char* const* next, const Partial& partial) const {
    constexpr int kCols = value_columns(H);
    constexpr std::int64_t kPrefetched = kGroupKeys / kUnitSize<U> * kCols * 64;
    for (std::int64_t column = 0; column < padded_dim_; column += kCols * kWidth) {
      add_values<U, V, L, H, kCols>(partial.sums + head * padded_dim_ + column, padded_dim_, factors + head,
                                    weights + head, chunk.groups, chunk.num_groups, column, next,
                                    column / (kCols * kWidth) * kPrefetched);
    }
  }

  const AttentionDecodeParams& p_;
  const DecodeTask& task_;
  Staged<U>& staged_;
  std::int64_t padded_dim_;
  const T* keys_;
  const T* values_;
  std::int64_t cell_stride_;
  const std::int32_t* blocks_;
};

// Out row of one head from the partial results of its splits, `stride` floats apart.
template <class T>
void reduce(T* out, const Partial& first, std::int64_t stride, std::int64_t splits, std::int64_t lane,
            std::int64_t head_dim, std::int64_t padded_dim, float scale) {
  float maximum = first.maxima[lane];
  for (std::int64_t s = 1; s < splits; ++s) {
    const float other = first.maxima[s * stride + lane];
    maximum = other > maximum ? other : maximum;
  }
  alignas(64) float sums[kMaxHeadDim] = {};
  float weight = 0;
  for (std::int64_t s = 0; s < splits; ++s) {
    const float factor = exp2_negative<float>(broadcast(first.maxima[s * stride + lane] - maximum), scale)[0];
    weight += factor * first.weights[s * stride + lane];
    const float* partial = first.sums + s * stride + lane * padded_dim;
    for (std::int64_t i = 0; i < head_dim; i += kWidth) store(sums + i, load(sums + i) + load(partial + i) * factor);
  }
  for_each_vector(head_dim, [&](std::int64_t i, int n) { store_n(out + i, load(sums + i) * (1.0f / weight), n); });
}

// Heads of a group in blocks of L, the last one possibly not full.
template <class T, int L>
void decode(const AttentionDecodeParams& p) {
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  const std::int64_t blocks = (group + L - 1) / L;
  const std::int64_t padded_dim = round_up(p.head_dim, kValueAlign);
  const std::int64_t stride = Partial::size(padded_dim, L);
  const std::int64_t partial_bytes = p.num_tasks * blocks * stride * 4;
  const std::int64_t staged_bytes = round_up(sizeof(Staged<Unit<T>>), 64);
  auto* memory = static_cast<std::byte*>(scratch(partial_bytes + max_threads() * staged_bytes));
  auto* partials = reinterpret_cast<float*>(memory);
  parallel_for(p.num_tasks, [&](std::int64_t index, int thread) {
    auto* staged = reinterpret_cast<Staged<Unit<T>>*>(memory + partial_bytes + thread * staged_bytes);
    Task<T> task(p, p.tasks[index], *staged);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t heads = group - block * L < L ? group - block * L : L;
      task.template run<L>(block * L, heads, partials + (block * p.num_tasks + index) * stride);
    }
  });
  parallel_rows(p.num_seqs * p.num_heads, p.head_dim * 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t kv_index = i / group, head = i % group;
      const std::int64_t first_task = p.first_task[kv_index];
      const Partial first(partials + (head / L * p.num_tasks + first_task) * stride, padded_dim, L);
      reduce<T>(static_cast<T*>(p.out) + i * p.head_dim, first, stride, p.first_task[kv_index + 1] - first_task,
                head % L, p.head_dim, padded_dim, p.scale * kLog2E);
    }
  });
}

template <class T>
void decode(const AttentionDecodeParams& p) {
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  if (kMostLanes >= 16 && group > 8) return decode<T, (kMostLanes < 16 ? kMostLanes : 16)>(p);
  if (kMostLanes >= 8 && group > 4) return decode<T, (kMostLanes < 8 ? kMostLanes : 8)>(p);
  decode<T, 4>(p);
}

}  // namespace

void attention_decode_kernel(const AttentionDecodeParams& p) {
  p.dtype == DType::f32 ? decode<float>(p) : decode<bf16>(p);
}

}  // namespace dpn::DPN_ISA
