#include <cstddef>

#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/attention.h"
#include "ops/attention_pack.h"

namespace dpn::DPN_ISA {

namespace {

constexpr float kLog2E = 1.44269504088896f;
constexpr std::int64_t kChunk = 128;

template <class T>
struct Memory {
  static std::int64_t bytes(std::int64_t head_dim) {
    return 4 * (2 * kChunk * head_dim + 2 * kChunk * round_up(head_dim, kPanel) + kRows * head_dim);
  }
};

// The partial result of one task: head_dim sums, maximum and weight of each query head of the group.
template <class T>
void attend_task(const AttentionDecodeParams& p, const DecodeTask& task, float* partial, std::byte* memory) {
  using U = Unit<T>;
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  const std::int64_t padded_dim = round_up(p.head_dim, kPanel), rows = round_up(group, kRows);
  U* packed_k = reinterpret_cast<U*>(memory);
  U* packed_v = packed_k + kChunk * p.head_dim;
  T* k = reinterpret_cast<T*>(packed_v + kChunk * padded_dim);
  T* v = k + kChunk * p.head_dim;
  const std::int64_t q_units = p.head_dim / kUnitSize<U>;
  U* q = reinterpret_cast<U*>(partial + rows * (padded_dim + 2));
  for (std::int64_t r = 0; r < rows; ++r) {
    pack_row<T>(q + r * q_units,
                static_cast<const T*>(p.q) + task.sequence * p.q_stride[0] +
                    (task.kv_head * group + (r < group ? r : 0)) * p.q_stride[1],
                p.head_dim);
  }
  const Tile<U> tile{q,          partial,   partial + rows * padded_dim, partial + rows * (padded_dim + 1),
                     p.head_dim, padded_dim};
  const std::int64_t plane = p.num_kv_heads * p.block_size * p.head_dim;
  for (std::int64_t key = task.first_key; key < task.last_key; key += kChunk) {
    const std::int64_t count = task.last_key - key < kChunk ? task.last_key - key : kChunk;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t cell = p.block_table[task.sequence * p.max_blocks + (key + i) / p.block_size];
      const T* row = static_cast<const T*>(p.kv_cache) + (cell * p.layers_per_cell + p.layer_in_cell) * 2 * plane +
                     (task.kv_head * p.block_size + (key + i) % p.block_size) * p.head_dim;
      std::memcpy(k + i * p.head_dim, row, static_cast<std::size_t>(p.head_dim) * sizeof(T));
      std::memcpy(v + i * p.head_dim, row + plane, static_cast<std::size_t>(p.head_dim) * sizeof(T));
    }
    pack_keys<T>(packed_k, k, p.head_dim, count, p.head_dim);
    pack_values<T>(packed_v, kChunk / kUnitSize<U> * kPanel, v, p.head_dim, count, p.head_dim);
    const KeyBlock<U> block{packed_k, packed_v, kChunk / kUnitSize<U> * kPanel, key == task.first_key};
    const std::int64_t visible[kRows] = {count, count, count, count, count, count};
    for (std::int64_t r = 0; r < rows; r += kRows) attend(tile, r, block, visible, p.scale * kLog2E);
  }
}

template <class T>
void reduce(const AttentionDecodeParams& p, std::int64_t sequence, std::int64_t head, const float* partials,
            std::int64_t partial_size) {
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  const std::int64_t padded_dim = round_up(p.head_dim, kPanel), rows = round_up(group, kRows);
  const std::int64_t index = sequence * p.num_kv_heads + head / group, row = head % group;
  const float* first = partials + p.first_task[index] * partial_size;
  const std::int64_t splits = p.first_task[index + 1] - p.first_task[index];
  float maximum = first[rows * padded_dim + row];
  for (std::int64_t s = 1; s < splits; ++s) {
    const float other = first[s * partial_size + rows * padded_dim + row];
    maximum = other > maximum ? other : maximum;
  }
  alignas(64) float sums[256 + kPanel] = {};
  float weight = 0;
  for (std::int64_t s = 0; s < splits; ++s) {
    const float* partial = first + s * partial_size;
    const float factor =
        exp2_negative<float>(broadcast(partial[rows * padded_dim + row] - maximum), p.scale * kLog2E)[0];
    weight += factor * partial[rows * (padded_dim + 1) + row];
    for (std::int64_t i = 0; i < p.head_dim; i += kWidth) {
      store(sums + i, load(sums + i) + load(partial + row * padded_dim + i) * factor);
    }
  }
  T* out = static_cast<T*>(p.out) + (sequence * p.num_heads + head) * p.head_dim;
  for_each_vector(p.head_dim, [&](std::int64_t i, int n) { store_n(out + i, load(sums + i) * (1.0f / weight), n); });
}

template <class T>
void decode(const AttentionDecodeParams& p) {
  const std::int64_t rows = round_up(p.num_heads / p.num_kv_heads, kRows);
  const std::int64_t partial_size = round_up(rows * (round_up(p.head_dim, kPanel) + 2 + p.head_dim), 16);
  const std::int64_t thread_bytes = round_up(Memory<T>::bytes(p.head_dim), 64);
  auto* memory = static_cast<std::byte*>(scratch(p.num_tasks * partial_size * 4 + max_threads() * thread_bytes));
  auto* partials = reinterpret_cast<float*>(memory);
  parallel_for(p.num_tasks, [&](std::int64_t task, int thread) {
    attend_task<T>(p, p.tasks[task], partials + task * partial_size,
                   memory + p.num_tasks * partial_size * 4 + thread * thread_bytes);
  });
  parallel_rows(p.num_seqs * p.num_heads, p.head_dim * 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      reduce<T>(p, i / p.num_heads, i % p.num_heads, partials, partial_size);
    }
  });
}

}  // namespace

void attention_decode_kernel(const AttentionDecodeParams& p) {
  p.dtype == DType::f32 ? decode<float>(p) : decode<bf16>(p);
}

}  // namespace dpn::DPN_ISA
