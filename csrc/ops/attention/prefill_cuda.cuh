// Attention of many query rows. A block takes 64 or 128 rows of one head, a warp 16 or 32 of them, and goes through the
// keys in tiles. While it computes with one tile of keys and values, the next one is copied to shared memory.
//
// Every warp reads every tile of keys and values from shared memory; with 32 rows per warp these reads are half as
// many. The result of a row is the same bit for bit.
#pragma once

#include "core/check.h"
#include "core/cuda_launch.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/paged_rows_cuda.cuh"
#include "ops/attention/prefill_warp_cuda.cuh"
#include "ops/attention/row_tiles_cuda.cuh"

namespace dpn::cuda {

namespace prefill {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// Query rows of a block. A warp has kTiles times the 16 rows of a tensor core's instruction.
template <int kTiles>
constexpr int kRows = 16 * kTiles * kWarps;

// Shared memory of a block: two stages of keys and values, [stage][K, V][kKeys, kStride], and queries [kRows, kStride].
// Where queries are kept in registers they have no memory of their own and pass through the second stage.
template <int kHeadDim, int kTiles>
struct Shared {
  // ldmatrix takes 16 dimensions at once; with more than 128 the sums and queries of a thread exceed its registers.
  static_assert(kHeadDim % 16 == 0 && kHeadDim >= 16 && kHeadDim <= 128);
  static constexpr int kTileBytes = kKeys * kStride<kHeadDim> * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueries = kTiles == 1 ? kStageBytes : 2 * kStageBytes;
  static constexpr int kBytes = kTiles == 1 ? 2 * kStageBytes : kQueries + kRows<kTiles> * kStride<kHeadDim> * 2;
};

// The rows and keys that a block works on.
struct Work {
  int sequence;
  int head;
  int kv_head;
  int first_token;    // packed row of key 0; cached keys count as if they were packed before the others
  int num_rows;       // number of query rows, up to kRows
  int first_own_key;  // index of the first query row's own key among the sequence's keys
  int num_keys;       // number of keys of the sequence
};

template <int kTiles>
__device__ bool find_work(const AttentionParams& p, Work& work) {
  const int num_seqs = static_cast<int>(p.num_seqs);
  const RowTile tile = find_row_tile<kRows<kTiles>>(p.cu_seqlens, num_seqs, static_cast<int>(blockIdx.z));
  if (tile.sequence < 0) return false;
  const int first = p.cu_seqlens[tile.sequence], length = p.cu_seqlens[tile.sequence + 1] - first;
  work.sequence = tile.sequence;
  work.kv_head = static_cast<int>(blockIdx.y);
  work.head = work.kv_head * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  work.num_rows = min(kRows<kTiles>, length - tile.first_row);
  work.num_keys = p.context_lens ? p.context_lens[tile.sequence] : length;
  work.first_own_key = work.num_keys - length + tile.first_row;
  work.first_token = first + tile.first_row - work.first_own_key;
  return true;
}

// Calls function(row, column) for every 16-byte piece of [kCount, kHeadDim] elements that belongs to this thread. Where
// the threads cover whole rows, a thread's pieces are in one column, so that it computes only one address.
template <int kCount, int kHeadDim, class Function>
__device__ void for_each_piece(const Function& function) {
  constexpr unsigned kPiecesPerRow = kHeadDim / 8, kPieces = kCount * kPiecesPerRow;
  constexpr bool kWholeRows = kThreads % kPiecesPerRow == 0;
#pragma unroll
  for (unsigned first = 0; first < kPieces; first += kThreads) {
    const unsigned start = kWholeRows ? threadIdx.x : threadIdx.x + first;
    const unsigned row = start / kPiecesPerRow + (kWholeRows ? first / kPiecesPerRow : 0);
    const unsigned column = start % kPiecesPerRow * 8;
    if (first + kThreads <= kPieces || row < kCount) function(static_cast<int>(row), static_cast<int>(column));
  }
}

// Address of element `column` of a packed row of one head.
//
// strides: between rows, which in bytes fits 32 bits, and between heads.
template <class T>
__device__ const T* packed_row(const void* rows, int row, const std::int64_t (&strides)[2], int head, int column) {
  const T* first = static_cast<const T*>(rows) + head * strides[1] + column;
  return offset_bytes(first, row, static_cast<int>(strides[0]) * static_cast<int>(sizeof(T)));
}

template <class T, int kHeadDim, int kTiles>
__device__ void load_queries(const AttentionParams& p, const Work& work, std::uint32_t target) {
  for_each_piece<kRows<kTiles>, kHeadDim>([&](int row, int column) {
    const int token = work.first_token + work.first_own_key + row;
    cp_async_16(target + (row * kStride<kHeadDim> + column) * 2,
                packed_row<T>(p.q, token, p.q_stride, work.head, column), row < work.num_rows);
  });
}

// Starts the copies of kKeys keys from `first_key` on, then of their values. In place of keys after the last one it
// writes zeros: memory there may hold NaN, and 0 times NaN is NaN.
template <class T, int kHeadDim, bool kPaged>
__device__ void load_keys(const AttentionParams& p, const Work& work, int first_key, std::uint32_t target) {
  for_each_piece<kKeys, kHeadDim>([&](int row, int column) {
    const bool is_valid = first_key + row < work.num_keys;
    const T *k, *v;
    if constexpr (kPaged) {
      const PagedRows<T, kHeadDim> rows(p.paged, static_cast<int>(p.num_kv_heads), work.sequence, work.kv_head, column);
      k = rows.key(rows.place(min(first_key + row, work.num_keys - 1)));  // there may be no block after the last key
      v = rows.value(k);
    } else {
      const int token = work.first_token + first_key + row;
      k = packed_row<T>(p.k, token, p.k_stride, work.kv_head, column);
      v = packed_row<T>(p.v, token, p.v_stride, work.kv_head, column);
    }
    const std::uint32_t place = target + (row * kStride<kHeadDim> + column) * 2;
    cp_async_16(place, k, is_valid);
    cp_async_16(place + kKeys * kStride<kHeadDim> * 2, v, is_valid);
  });
}

// Number of blocks per multiprocessor for which the number of registers is limited. A window takes some more registers.
template <int kHeadDim, int kTiles, bool kHasWindow>
constexpr int kBlocks = (kTiles == 1 ? 3 : 2) + (kHeadDim <= 64 ? 1 : 0) - (kHasWindow ? 1 : 0);

template <class T, int kHeadDim, int kTiles, bool kPaged, bool kHasWindow>
__global__ void __launch_bounds__(kThreads, kBlocks<kHeadDim, kTiles, kHasWindow>)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  using Layout = Shared<kHeadDim, kTiles>;
  constexpr int kWarpRows = 16 * kTiles;
  Work work;
  if (!find_work<kTiles>(p, work)) return;
  const std::uint32_t shared = shared_address(dynamic_shared());
  // The first key that each row of the block sees.
  const std::int32_t* first_keys = kHasWindow ? p.first_keys + work.first_token + work.first_own_key : nullptr;
  const int first_tile = kHasWindow ? first_keys[0] / kKeys : 0;
  const auto stage = [&](int tile) { return shared + (tile - first_tile) % 2 * Layout::kStageBytes; };

  load_queries<T, kHeadDim, kTiles>(p, work, shared + Layout::kQueries);
  cp_async_commit();
  load_keys<T, kHeadDim, kPaged>(p, work, first_tile * kKeys, stage(first_tile));
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  const int first_row = static_cast<int>(threadIdx.x) / kWarpSize * kWarpRows;  // of the warp, within the block
  const int first_own_key = work.first_own_key + first_row;
  const Queries<kHeadDim, kTiles> queries(shared + Layout::kQueries + first_row * kStride<kHeadDim> * 2);

  // end_key(end_row): one past the last key that the rows before `end_row` see. A warp may have no rows at all.
  const auto end_key = [&](int end_row) { return p.causal ? work.first_own_key + end_row : work.num_keys; };
  const int num_tiles = (end_key(work.num_rows) + kKeys - 1) / kKeys;
  const int warp_end = first_row < work.num_rows ? end_key(min(first_row + kWarpRows, work.num_rows)) : 0;
  // The windows of all rows of the warp begin between these keys.
  const int last_row = min(first_row + kWarpRows, work.num_rows) - 1;
  const int warp_begin = kHasWindow && warp_end > 0 ? first_keys[first_row] : 0;
  const int all_begin = kHasWindow && warp_end > 0 ? first_keys[last_row] : 0;

  Accumulator<kHeadDim> sums[kTiles];
  const float scale_log2 = p.scale * kLog2E;
  for (int tile = first_tile; tile < num_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is complete, and all warps are done with the other stage
    const int first_key = tile * kKeys, last_key = first_key + kKeys - 1;
    if (tile + 1 < num_tiles) load_keys<T, kHeadDim, kPaged>(p, work, first_key + kKeys, stage(tile + 1));
    cp_async_commit();
    if (first_key >= warp_end || (kHasWindow && last_key < warp_begin)) continue;
    Scores<kTiles> s;
    multiply_keys<T>(s, queries, stage(tile));
    if (last_key >= work.num_keys || (p.causal && last_key > first_own_key)) {
      mask<kTiles>(s, first_key, work.num_keys, first_own_key, p.causal);
    }
    if (kHasWindow && first_key < all_begin)
      mask_before<kTiles>(s, first_key, first_keys + first_row, last_row - first_row);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) sums[t].softmax(s[t], scale_log2);
    add_values<T>(sums, s, stage(tile) + Layout::kTileBytes);
  }
  cp_async_wait<0>();  // the last, empty group
  __syncthreads();     // all warps are done with the keys

  // The output goes through shared memory, so that it is written 16 bytes at a time.
  T* rows = reinterpret_cast<T*>(dynamic_shared() + Layout::kQueries) + first_row * kStride<kHeadDim>;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) sums[t].finish(rows + t * 16 * kStride<kHeadDim>);
  __syncwarp();
  constexpr int kPiecesPerRow = kHeadDim / 8;
  for (int piece = lane(); piece < kWarpRows * kPiecesPerRow; piece += kWarpSize) {
    const int row = piece / kPiecesPerRow, column = piece % kPiecesPerRow * 8;
    if (first_row + row >= work.num_rows) break;
    const std::int64_t token = work.first_token + first_own_key + row;
    T* target = static_cast<T*>(p.out) + (token * p.num_heads + work.head) * kHeadDim + column;
    store(target, load<8>(rows + row * kStride<kHeadDim> + column));
  }
}

template <int kHeadDim, int kTiles, bool kPaged, bool kHasWindow = false>
void run(const char* op, const AttentionParams& p, Stream stream) {
  // Upper bound of the number of tiles: each sequence has at most one that is not full. Blocks without rows return.
  const std::int64_t num_tiles = ceil_div(p.num_tokens, kRows<kTiles>) + p.num_seqs;
  const dim3 grid(static_cast<unsigned>(p.num_heads / p.num_kv_heads), static_cast<unsigned>(p.num_kv_heads),
                  static_cast<unsigned>(p.num_tokens ? num_tiles : 0));
  dispatch_half(p.dtype, [&](auto type) {
    launch(op, attention_kernel<decltype(type), kHeadDim, kTiles, kPaged, kHasWindow>, grid, dim3(kThreads),
           Shared<kHeadDim, kTiles>::kBytes, stream, p);
  });
}

// Whether blocks of 128 rows would be mostly full, and there would be at least two for every multiprocessor.
inline bool fills_wide_tiles(const AttentionParams& p) {
  const std::int64_t blocks = p.num_heads * (p.num_tokens / kRows<2>);
  return p.num_tokens >= kRows<2> * p.num_seqs && blocks >= 2 * num_multiprocessors();
}

}  // namespace prefill

template <int kHeadDim>
void run_attention(const AttentionParams& p, Stream stream) {
  if (p.first_keys) {
    if (!p.k) return prefill::run<kHeadDim, 1, true, true>("attention_extend", p, stream);
    return prefill::run<kHeadDim, 1, false, true>("attention", p, stream);
  }
  if (!p.k) return prefill::run<kHeadDim, 1, true>("attention_extend", p, stream);
  if constexpr (kHeadDim >= 64) {  // wide blocks pay off only there
    if (prefill::fills_wide_tiles(p)) return prefill::run<kHeadDim, 2, false>("attention", p, stream);
  }
  prefill::run<kHeadDim, 1, false>("attention", p, stream);
}

}  // namespace dpn::cuda
