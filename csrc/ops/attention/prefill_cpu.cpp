#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/attention/attention.h"
#include "ops/attention/prefill_pack.h"
#if defined(__AMX_BF16__)
#include "ops/attention/prefill_amx.h"
#endif

namespace dpn::DPN_ISA {

namespace {

// A packed head: its rows of q, and its packed keys and values.
template <class T>
struct Head {
  std::int64_t sequence;
  std::int64_t kv_head;
  std::int64_t first_token;
  std::int64_t rows;
  std::int64_t keys;
  std::int64_t padded_keys;
  Unit<T>* packed_k;
  Unit<T>* packed_v;
  std::int64_t v_stride;  // number of units between the panels of packed_v

  Head(const AttentionParams& p, const PackedHead& head, Unit<T>* packed)
      : sequence(head.sequence),
        kv_head(head.kv_head),
        first_token(p.cu_seqlens[head.sequence]),
        rows(p.cu_seqlens[head.sequence + 1] - first_token),
        keys(p.context_lens[head.sequence]),
        padded_keys(round_up(keys, kKeyPadding)) {
    packed_k = packed + head.offset / kUnitSize<Unit<T>>;
    packed_v = packed_k + padded_keys * row_units<Unit<T>>(p.head_dim);
    v_stride = padded_keys / kUnitSize<Unit<T>> * kPanel;
  }
};

// Rows of a head and KV blocks lie far apart, where the processor's own prefetcher does not find them.
template <class T>
void prefetch(const T* first, std::int64_t size) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t i = 0; i < size; i += kLine) __builtin_prefetch(first + i);
}

// Rows of keys or values, `stride` elements apart.
template <class T>
struct Rows {
  const T* first;
  std::int64_t stride;
};

// Keys (kind 0) or values (kind 1) [key, key + count) of a head: in place, or copied together from their KV blocks.
template <class T>
Rows<T> rows_of(const AttentionParams& p, const Head<T>& head, int kind, std::int64_t key, std::int64_t count,
                T* copy) {
  if (p.k != nullptr) {
    const auto* base = static_cast<const T*>(kind == 0 ? p.k : p.v);
    const auto* stride = kind == 0 ? p.k_stride : p.v_stride;
    const T* first = base + (head.first_token + key) * stride[0] + head.kv_head * stride[1];
    for (std::int64_t r = 0; r < count; ++r) prefetch(first + r * stride[0], p.head_dim);
    return {first, stride[0]};
  }
  const PagedKeys& paged = p.paged;
  const std::int64_t plane = paged.block_size * p.head_dim;
  const auto row_in_cache = [&](std::int64_t row) {
    const std::int64_t block = paged.block_table[head.sequence * paged.max_blocks + row / paged.block_size];
    return static_cast<const T*>(paged.kv_cache) +
           (((block * paged.layers_per_block + paged.layer_in_block) * 2 + kind) * p.num_kv_heads + head.kv_head) *
               plane +
           row % paged.block_size * p.head_dim;
  };
  for (std::int64_t row = key; row < key + count;) {
    const std::int64_t left = key + count - row, here = paged.block_size - row % paged.block_size;
    const std::int64_t taken = left < here ? left : here;
    const std::int64_t next = std::min(left - taken, std::int64_t{paged.block_size});
    if (next > 0) prefetch(row_in_cache(row + taken), next * p.head_dim);
    std::memcpy(copy + (row - key) * p.head_dim, row_in_cache(row),
                static_cast<std::size_t>(taken * p.head_dim) * sizeof(T));
    row += taken;
  }
  return {copy, p.head_dim};
}

template <class T>
void pack(const AttentionParams& p, const Head<T>& head, std::int64_t key, T* copy) {
  constexpr int kStep = kUnitSize<Unit<T>>;
  const std::int64_t count = head.keys - key < kPackKeys ? head.keys - key : kPackKeys;
  const Rows<T> k = rows_of(p, head, 0, key, count, copy);
  pack_keys<T>(head.packed_k + key * row_units<Unit<T>>(p.head_dim), k.first, k.stride, count, p.head_dim);
  const Rows<T> v = rows_of(p, head, 1, key, count, copy);
  pack_values<T>(head.packed_v + key / kStep * kPanel, head.v_stride, v.first, v.stride, count, p.head_dim);
}

// A thread's buffers for one tile.
template <class T>
struct TileMemory {
  Unit<T>* q;
  float* sums;
  float* maxima;
  float* weights;

  static std::int64_t bytes(std::int64_t head_dim) {
    return 4 * kTileRows * (row_units<Unit<T>>(head_dim) + round_up(head_dim, kPanel) + 2);
  }

  TileMemory(std::byte* memory, std::int64_t head_dim) {
    maxima = reinterpret_cast<float*>(memory);
    weights = maxima + kTileRows;
    sums = weights + kTileRows;
    q = reinterpret_cast<Unit<T>*>(sums + kTileRows * round_up(head_dim, kPanel));
  }
};

template <class T>
void attend_tile(const AttentionParams& p, const PackedHead& packed, const Head<T>& head, std::int64_t first_row,
                 const TileMemory<T>& memory) {
  using U = Unit<T>;
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  const std::int64_t context = head.keys - head.rows;  // number of keys before the first row of q
  const std::int64_t left = head.rows * group - first_row;
  const std::int64_t rows = left < kTileRows ? left : kTileRows;
  const std::int64_t padded_rows = round_up(rows, kStepRows<U>);
  const std::int64_t q_units = row_units<U>(p.head_dim);
  // Rows after the last one repeat it, which costs little and avoids a special case.
  const auto row_or_last = [&](std::int64_t r) { return first_row + (r < rows ? r : rows - 1); };
  const auto q_row = [&](std::int64_t row) {
    return static_cast<const T*>(p.q) + (head.first_token + row / group) * p.q_stride[0] +
           (packed.kv_head * group + row % group) * p.q_stride[1];
  };
  for (std::int64_t r = 0; r < rows; ++r) prefetch(q_row(first_row + r), p.head_dim);
  for (std::int64_t r = 0; r < padded_rows; ++r) pack_row<T>(memory.q + r * q_units, q_row(row_or_last(r)), p.head_dim);
  const Tile<U> tile{
      rows, memory.q, memory.sums, memory.maxima, memory.weights, p.head_dim, round_up(p.head_dim, kPanel)};
  [[maybe_unused]] const AttendScope<U> scope;
  const std::int64_t keys = p.causal ? context + row_or_last(padded_rows) / group + 1 : head.keys;
  const auto first_key = [&](std::int64_t row) -> std::int64_t {
    return p.first_keys ? p.first_keys[head.first_token + row / group] : 0;
  };
  // Blocks end at multiples of kKeyBlock wherever the first begins, so that a row's sums do not depend on the tile.
  const std::int64_t begin = first_key(first_row) / kKeyPadding * kKeyPadding;
  for (std::int64_t key = begin, end; key < keys; key = end) {
    end = key / kKeyBlock * kKeyBlock + kKeyBlock;
    const KeyBlock<U> block{head.packed_k + key * q_units, head.packed_v + key / kUnitSize<U> * kPanel, head.v_stride,
                            key == begin};
    const std::int64_t block_keys = (keys < end ? keys : end) - key;
    for (std::int64_t r = 0; r < padded_rows; r += kStepRows<U>) {
      Seen<U> seen;
      for (int i = 0; i < kStepRows<U>; ++i) {
        const std::int64_t row = row_or_last(r + i);
        const std::int64_t visible = p.causal ? context + row / group + 1 - key : block_keys;
        seen.first[i] = first_key(row) - key;
        seen.end[i] = visible < block_keys ? visible : block_keys;
      }
      attend(tile, r, block, seen, p.scale * kLog2E);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t row = first_row + r;
    T* out = static_cast<T*>(p.out) +
             ((head.first_token + row / group) * p.num_heads + packed.kv_head * group + row % group) * p.head_dim;
    const float* sums = tile.sums + r * tile.padded_dim;
    const float inverse = 1.0f / tile.weights[r];
    for_each_vector(p.head_dim, [&](std::int64_t i, int n) { store_n(out + i, load(sums + i) * inverse, n); });
  }
}

template <class T>
void attention(const AttentionParams& p) {
  const std::int64_t packed_bytes = round_up(p.max_elements * 4 / kUnitSize<Unit<T>>, 64);
  const std::int64_t copy_bytes = p.k == nullptr ? kPackKeys * p.head_dim * sizeof(T) : 0;
  const std::int64_t tile_bytes = round_up(std::max(TileMemory<T>::bytes(p.head_dim), copy_bytes), 64);
  auto* memory = static_cast<std::byte*>(scratch(packed_bytes + max_threads() * tile_bytes));
  auto* packed = reinterpret_cast<Unit<T>*>(memory);
  for (const Wave* w = p.waves; w < p.waves + p.num_waves; ++w) {
    const Wave& wave = *w;
    parallel_for(wave.num_packs, [&](std::int64_t task, int thread) {
      pack<T>(p, Head<T>(p, wave.heads[wave.packs[task].head], packed), wave.packs[task].first_key,
              reinterpret_cast<T*>(memory + packed_bytes + thread * tile_bytes));
    });
    parallel_for(wave.num_tiles, [&](std::int64_t task, int thread) {
      const TileTask& tile = wave.tiles[task];
      const PackedHead& head = wave.heads[tile.head];
      attend_tile<T>(p, head, Head<T>(p, head, packed), tile.first_row,
                     TileMemory<T>(memory + packed_bytes + thread * tile_bytes, p.head_dim));
    });
  }
}

}  // namespace

void attention_kernel(const AttentionParams& p) { p.dtype == DType::f32 ? attention<float>(p) : attention<bf16>(p); }

}  // namespace dpn::DPN_ISA
