#include <cstddef>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/attention/decode_single.h"
#include "ops/reduction/last_row_scores.h"

namespace dpn::DPN_ISA {

namespace {

constexpr int kTileKeys = 16;  // keys whose rows are read together: a multiple of every kWidth

// Number of elements in a vector of units.
template <class T>
constexpr std::int64_t kRunElements = kWidth * kUnitSize<Unit<T>>;

// Where the keys of one query lie.
template <class T>
struct Keys {
  const T* base;               // key head 0 of the first key, or of row 0 of block 0
  std::int64_t row_stride;     // between neighbouring keys (of one block where keys are paged)
  std::int64_t head_stride;    // between key heads
  const std::int32_t* blocks;  // null where keys are packed
  std::int64_t block_size;
  std::int64_t block_stride;

  std::int64_t offset(std::int64_t key) const {
    if (!blocks) return key * row_stride;
    return blocks[key / block_size] * block_stride + key % block_size * row_stride;
  }
};

template <class T>
Keys<T> keys_of(const LastRowScoresParams& p, std::int64_t query) {
  if (p.cu_seqlens) {
    const T* first = static_cast<const T*>(p.k) + p.cu_seqlens[query] * p.k_stride[0];
    return {first, p.k_stride[0], p.k_stride[1], nullptr, 0, 0};
  }
  const std::int64_t head = p.paged.block_size * p.head_dim, plane = p.num_kv_heads * head;
  return {.base = static_cast<const T*>(p.paged.kv_cache) + p.paged.layer_in_block * 2 * plane,
          .row_stride = p.head_dim,
          .head_stride = head,
          .blocks = p.paged.block_table + query * p.paged.max_blocks,
          .block_size = p.paged.block_size,
          .block_stride = p.paged.layers_per_block * 2 * plane};
}

// What a task writes. The weight of a key is 2^(score - maximum), with the maximum over the task's keys.
struct TaskResult {
  float* weights;  // [num_heads, keys_per_task]
  float* maxima;   // [num_heads] of the scores; write_factors replaces them by the factors of the weights
  float* sums;     // [num_heads] of the weights

  static std::int64_t size(const LastRowScoresParams& p) { return p.num_heads * (p.keys_per_task + 2); }
  TaskResult(const LastRowScoresParams& p, float* memory, std::int64_t task)
      : weights(memory + task * size(p)), maxima(weights + p.num_heads * p.keys_per_task), sums(maxima + p.num_heads) {}
};

// A thread's copies: the query's heads as units, and keys that do not fill whole vectors.
template <class T>
struct Copies {
  Unit<T>* q;  // [heads, padded_dim / kUnitSize]
  T* keys;     // [kTileKeys, padded_dim]

  static std::int64_t bytes(std::int64_t heads, std::int64_t padded_dim) {
    return round_up(4 * (heads + kTileKeys) * padded_dim, 64);
  }
  Copies(std::byte* memory, std::int64_t padded_dim)
      : q(reinterpret_cast<Unit<T>*>(memory + 4 * kTileKeys * padded_dim)), keys(reinterpret_cast<T*>(memory)) {}
};

// A vector of a key in the type that the query has.
template <class U, class T>
inline auto load_key(const T* source) {
  if constexpr (kUnitSize<U> == 2) {
    return load_units(reinterpret_cast<const U*>(source));
  } else {
    return load(source);
  }
}

// Writes the product of the query with key rows[r] to scores[r]. With kPrefetch it prefetches next_rows.
template <bool kPrefetch, class T>
inline void score_tile(float* scores, const T* const* rows, const T* const* next_rows, const Unit<T>* q,
                       std::int64_t padded_dim) {
  for (int first = 0; first < kTileKeys; first += kWidth) {
    VecF sums[kWidth] = {};
    for (std::int64_t i = 0; i < padded_dim; i += kRunElements<T>) {
      const auto query = load_units(q + i / kUnitSize<Unit<T>>);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        if constexpr (kPrefetch) prefetch(reinterpret_cast<const char*>(next_rows[first + r] + i));
        sums[r] = dot(sums[r], load_key<Unit<T>>(rows[first + r] + i), query);
      }
    }
    store(scores + first, sum_each(sums));
  }
}

// Turns the scores of `count` keys into weights, and sets the first `hidden` and the rest of the last tile to 0.
inline void weigh(float* scores, std::int64_t hidden, std::int64_t count, float scale, float* maximum,
                  float* weight_sum) {
  const std::int64_t padded = round_up(count, kTileKeys);
  for (std::int64_t i = 0; i < hidden && i < count; ++i) scores[i] = -__builtin_inff();
  for (std::int64_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
  VecF highest = broadcast(-__builtin_inff());
  for (std::int64_t i = 0; i < padded; i += kWidth) highest = max(load(scores + i), highest);
  *maximum = reduce_max(highest);
  const VecF shift = broadcast(*maximum == -__builtin_inff() ? 0.0f : *maximum);
  VecF sum{};
  for (std::int64_t i = 0; i < padded; i += kWidth) {
    const VecF weight = exp2_negative<float>(load(scores + i) - shift, scale);
    store(scores + i, weight);
    sum += weight;
  }
  *weight_sum = reduce_sum(sum);
}

// Key heads [begin, end) of one task. The outer loop goes over tiles of keys, the inner one over heads: what the
// processor prefetches after a head's rows then belongs to the next head.
template <class T>
class Task {
 public:
  Task(const LastRowScoresParams& p, const DecodeTask& task, std::int64_t begin, std::int64_t end,
       const Copies<T>& copies, const TaskResult& result)
      : p_(p),
        task_(task),
        begin_(begin),
        end_(end),
        copies_(copies),
        result_(result),
        keys_(keys_of<T>(p, task.sequence)),
        group_(p.num_heads / p.num_kv_heads),
        padded_dim_(round_up(p.head_dim, kRunElements<T>)) {}

  void run() const {
    copy_queries();
    if (padded_dim_ != p_.head_dim)
      std::memset(copies_.keys, 0, static_cast<std::size_t>(kTileKeys * padded_dim_) * sizeof(T));
    const T* rows[2][kTileKeys];  // of a tile and the one after it
    find_rows(task_.first_key, rows[0]);
    for (std::int64_t key = task_.first_key, turn = 0; key < task_.last_key; key += kTileKeys, turn ^= 1) {
      find_rows(key + kTileKeys, rows[turn ^ 1]);
      score_keys(key, rows[turn], rows[turn ^ 1]);
    }
    const std::int64_t hidden = p_.first_keys ? p_.first_keys[task_.sequence] - task_.first_key : 0;
    for (std::int64_t head = begin_ * group_; head < end_ * group_; ++head) {
      weigh(weights_of(head), hidden, task_.last_key - task_.first_key, p_.scale * kLog2E, result_.maxima + head,
            result_.sums + head);
    }
  }

 private:
  float* weights_of(std::int64_t head) const { return result_.weights + head * p_.keys_per_task; }
  Unit<T>* query_of(std::int64_t head) const { return copies_.q + head * padded_dim_ / kUnitSize<Unit<T>>; }

  void copy_queries() const {
    const std::int64_t units = padded_dim_ / kUnitSize<Unit<T>>, used = p_.head_dim / kUnitSize<Unit<T>>;
    for (std::int64_t head = begin_ * group_; head < end_ * group_; ++head) {
      const T* row = static_cast<const T*>(p_.q) + task_.sequence * p_.q_stride[0] + head * p_.q_stride[1];
      Unit<T>* q = query_of(head);
      for (std::int64_t i = 0; i < used; ++i) to_unit(q + i, row + i * kUnitSize<Unit<T>>);
      for (std::int64_t i = used; i < units; ++i) q[i] = Unit<T>{};
    }
  }

  // Finds the rows of key head 0 in the tile that starts with `key`. Places after the task's last key get its row.
  void find_rows(std::int64_t key, const T** rows) const {
    for (int r = 0; r < kTileKeys; ++r) {
      rows[r] = keys_.base + keys_.offset(key + r < task_.last_key ? key + r : task_.last_key - 1);
    }
  }

  // Scores the tile that starts with `key`. first_rows, next_rows: key head 0 of this tile and of the next one.
  void score_keys(std::int64_t key, const T* const* first_rows, const T* const* next_rows) const {
    for (std::int64_t kv_head = begin_; kv_head < end_; ++kv_head) {
      // Prefetch two heads ahead, in this tile or the next: one head takes less time than memory needs to answer.
      const std::int64_t ahead = kv_head + 2, beyond = begin_ + ahead - end_;
      const T* const* ahead_rows = ahead < end_ ? first_rows : next_rows;
      const std::int64_t ahead_offset = (ahead < end_ ? ahead : beyond < end_ ? beyond : begin_) * keys_.head_stride;
      const T *rows[kTileKeys], *next[kTileKeys];
      for (int r = 0; r < kTileKeys; ++r) {
        rows[r] = placed(first_rows[r] + kv_head * keys_.head_stride, r);
        next[r] = ahead_rows[r] + ahead_offset;
      }
      const std::int64_t first_head = kv_head * group_;
      float* scores = weights_of(first_head) + key - task_.first_key;
      score_tile<true>(scores, rows, next, query_of(first_head), padded_dim_);
      for (std::int64_t h = 1; h < group_; ++h) {
        score_tile<false>(scores + h * p_.keys_per_task, rows, next, query_of(first_head + h), padded_dim_);
      }
    }
  }

  // The row itself if it fills whole vectors, else a copy with zeros after it.
  const T* placed(const T* row, int r) const {
    if (padded_dim_ == p_.head_dim) return row;
    T* copy = copies_.keys + r * padded_dim_;
    std::memcpy(copy, row, static_cast<std::size_t>(p_.head_dim) * sizeof(T));
    return copy;
  }

  const LastRowScoresParams& p_;
  const DecodeTask& task_;
  std::int64_t begin_;
  std::int64_t end_;
  const Copies<T>& copies_;
  TaskResult result_;
  Keys<T> keys_;
  std::int64_t group_;  // number of query heads of a key head
  std::int64_t padded_dim_;
};

// Replaces the maxima of a query's tasks by factors: a weight times its factor is a term of the mean over heads.
void write_factors(const LastRowScoresParams& p, float* memory, std::int64_t first_task) {
  const std::int64_t length = p.kv_lengths[p.tasks[first_task].sequence];
  const std::int64_t end = first_task + (length + p.keys_per_task - 1) / p.keys_per_task;
  const float scale = p.scale * kLog2E;
  for_each_vector(p.num_heads, [&](std::int64_t i, int n) {
    const auto maxima = [&](std::int64_t task) { return load_n(TaskResult(p, memory, task).maxima + i, n); };
    VecF highest = broadcast(-__builtin_inff()), sum{};
    for (std::int64_t task = first_task; task < end; ++task) highest = max(maxima(task), highest);
    for (std::int64_t task = first_task; task < end; ++task) {
      sum += exp2_negative<float>(maxima(task) - highest, scale) * load_n(TaskResult(p, memory, task).sums + i, n);
    }
    const VecF factor = 1.0f / (sum * static_cast<float>(p.num_heads));
    for (std::int64_t task = first_task; task < end; ++task) {
      store_n(TaskResult(p, memory, task).maxima + i, exp2_negative<float>(maxima(task) - highest, scale) * factor, n);
    }
  });
}

// Writes the scores of the keys [key, end) of a query. The last vector may read past the weights of a head, but not
// past the memory.
void write_scores(const LastRowScoresParams& p, float* memory, std::int64_t query, std::int64_t key, std::int64_t end,
                  float* out) {
  while (key < end) {
    const std::int64_t index = key / p.keys_per_task, next = (index + 1) * p.keys_per_task;
    const TaskResult result(p, memory, p.first_task[query] + index);
    const float* weights = result.weights + key % p.keys_per_task;
    const std::int64_t count = (next < end ? next : end) - key;
    for_each_vector(count, [&](std::int64_t i, int n) {
      VecF mean{};
      for (std::int64_t head = 0; head < p.num_heads; ++head) {
        mean += load(weights + head * p.keys_per_task + i) * result.maxima[head];
      }
      store_n(out + i, mean, n);
    });
    key += count;
    out += count;
  }
}

template <class T>
void run(const LastRowScoresParams& p) {
  const std::int64_t padded_dim = round_up(p.head_dim, kRunElements<T>), heads = p.num_kv_heads;
  const std::int64_t result_bytes = round_up((p.num_tasks * TaskResult::size(p) + kWidth) * 4, 64);
  const std::int64_t copies_bytes = Copies<T>::bytes(p.num_heads, padded_dim);
  auto* scratch_memory = static_cast<std::byte*>(scratch(result_bytes + max_threads() * copies_bytes));
  auto* memory = reinterpret_cast<float*>(scratch_memory);
  // One thread does all parts where there is little work.
  const std::int64_t parts = p.num_tasks * p.head_parts;
  const std::int64_t part_bytes =
      p.keys_per_task * heads * p.head_dim * static_cast<std::int64_t>(sizeof(T)) / p.head_parts;
  const std::int64_t turns = tasks_for_rows(parts, part_bytes);
  parallel_for(turns, [&](std::int64_t turn, int thread) {
    const Copies<T> copies(scratch_memory + result_bytes + thread * copies_bytes, padded_dim);
    for (std::int64_t i = parts * turn / turns; i < parts * (turn + 1) / turns; ++i) {
      const std::int64_t task = i / p.head_parts, part = i % p.head_parts;
      Task<T>(p, p.tasks[task], heads * part / p.head_parts, heads * (part + 1) / p.head_parts, copies,
              TaskResult(p, memory, task))
          .run();
    }
  });
  for (std::int64_t task = 0; task < p.num_tasks; ++task) {
    if (p.tasks[task].first_key == 0) write_factors(p, memory, task);
  }
  parallel_rows(p.num_scores, p.num_heads * 4, [&](std::int64_t begin, std::int64_t end) {
    const Segments& segments = p.segments;
    for (std::int64_t s = 0; begin < end; ++s) {
      const std::int64_t first = segments.cu_scores[s], last = segments.cu_scores[s + 1];
      if (last <= begin) continue;
      const std::int64_t stop = last < end ? last : end, key = segments.starts[s] - first, query = segments.queries[s];
      if (p.first_task[query] >= 0) write_scores(p, memory, query, key + begin, key + stop, p.out + begin);
      begin = stop;
    }
  });
}

}  // namespace

void last_row_scores_kernel(const LastRowScoresParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
