// Attention of many query rows: a block takes kRows rows of one head, a warp 16 of them, and goes through the keys in
// tiles with an online softmax. Scores and outputs live in registers in the layout of the tensor cores; the next tile
// of keys and values is on its way to shared memory while this one is computed with.
#pragma once

#include "core/check.h"
#include "core/cuda_launch.cuh"
#include "core/cuda_ptx.cuh"
#include "core/cuda_vector.cuh"
#include "ops/attention_cuda.h"
#include "ops/attention_tiles_cuda.cuh"

namespace dpn::cuda {

namespace prefill {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 16 * kWarps;
constexpr int kKeys = 64;
constexpr float kLog2E = 1.44269504088896341f;

// Shared memory of a block, [stage][K, V][kKeys, kStride]: two stages of keys and values. A row is padded by 16
// bytes, so that the 8 rows that ldmatrix reads at once lie in different banks.
template <int kHeadDim>
struct Shared {
  static constexpr int kStride = kHeadDim + 8;
  static constexpr int kTileElements = kKeys * kStride;
  static constexpr int kBytes = 4 * kTileElements * 2;
  static_assert(kRows == kKeys, "queries and the output pass through a tile of keys");
};

// 16-byte pieces of a tile [kKeys, kHeadDim] that a thread copies.
template <int kHeadDim>
constexpr int kPieces = kKeys * (kHeadDim / 8) / kThreads;

// What a block works on.
struct Work {
  int sequence;
  int head;
  int kv_head;
  int first_token;     // packed row of the tile's first query
  int num_rows;        // up to kRows
  int first_position;  // of the first query among the sequence's keys
  int num_keys;        // of the sequence
  int end_key;         // the first key that no query of the tile sees
};

__device__ inline bool find_work(const AttentionParams& p, Work& work) {
  const int num_seqs = static_cast<int>(p.num_seqs);
  const RowTile tile = find_row_tile<kRows>(p.cu_seqlens, num_seqs, static_cast<int>(blockIdx.y));
  if (tile.sequence < 0) return false;
  const int first = p.cu_seqlens[tile.sequence], length = p.cu_seqlens[tile.sequence + 1] - first;
  work.sequence = tile.sequence;
  work.head = static_cast<int>(blockIdx.x);
  work.kv_head = work.head / static_cast<int>(p.num_heads / p.num_kv_heads);
  work.first_token = first + tile.first_row;
  work.num_rows = min(kRows, length - tile.first_row);
  work.num_keys = p.context_lens ? p.context_lens[tile.sequence] : length;
  work.first_position = work.num_keys - length + tile.first_row;
  work.end_key = p.causal ? min(work.num_keys, work.first_position + kRows) : work.num_keys;
  return true;
}

template <class T, int kHeadDim>
__device__ void load_queries(const AttentionParams& p, const Work& work, std::uint32_t target) {
  constexpr int kPiecesPerRow = kHeadDim / 8, kStride = Shared<kHeadDim>::kStride;
#pragma unroll
  for (int i = 0; i < kPieces<kHeadDim>; ++i) {
    const int piece = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = piece / kPiecesPerRow, column = piece % kPiecesPerRow * 8;
    const std::int64_t token = work.first_token + min(row, work.num_rows - 1);
    const T* source = static_cast<const T*>(p.q) + token * p.q_stride[0] + work.head * p.q_stride[1] + column;
    cp_async_16(target + (row * kStride + column) * 2, source, row < work.num_rows);
  }
}

// Starts the copies of kKeys keys and values from `first_key` on; behind the last key there are zeros, since 0 times
// whatever lies there may be NaN.
template <class T, int kHeadDim, bool kPaged>
__device__ void load_keys(const AttentionParams& p, const Work& work, int first_key, std::uint32_t target) {
  constexpr int kPiecesPerRow = kHeadDim / 8, kStride = Shared<kHeadDim>::kStride;
  constexpr int kTileBytes = Shared<kHeadDim>::kTileElements * 2;
#pragma unroll
  for (int i = 0; i < kPieces<kHeadDim>; ++i) {
    const int piece = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = piece / kPiecesPerRow, column = piece % kPiecesPerRow * 8;
    const int key = min(first_key + row, work.num_keys - 1);
    const bool is_valid = first_key + row < work.num_keys;
    const T *k, *v;
    if constexpr (kPaged) {
      const int block_size = static_cast<int>(p.paged.block_size), block = key / block_size;
      const std::int64_t cell = p.paged.block_table[work.sequence * p.paged.max_blocks + block];
      const std::int64_t values = p.num_kv_heads * p.paged.block_size * kHeadDim;  // from a key to its value
      k = static_cast<const T*>(p.paged.kv_cache) +
          (cell * p.paged.layers_per_cell + p.paged.layer_in_cell) * 2 * values +
          (work.kv_head * block_size + key - block * block_size) * kHeadDim + column;
      v = k + values;
    } else {
      const std::int64_t token = work.first_token - work.first_position + key;
      k = static_cast<const T*>(p.k) + token * p.k_stride[0] + work.kv_head * p.k_stride[1] + column;
      v = static_cast<const T*>(p.v) + token * p.v_stride[0] + work.kv_head * p.v_stride[1] + column;
    }
    const std::uint32_t place = target + (row * kStride + column) * 2;
    cp_async_16(place, k, is_valid);
    cp_async_16(place + kTileBytes, v, is_valid);
  }
}

// Scores of a warp's 16 rows and kKeys keys: s[n] is the tile of keys 8 n to 8 n + 7.
template <class T, int kHeadDim>
__device__ void multiply_keys(float (&s)[kKeys / 8][4], const std::uint32_t (&q)[kHeadDim / 16][4],
                              std::uint32_t keys) {
  constexpr int kStride = Shared<kHeadDim>::kStride;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // Matrices 0 and 1 are two halves of 16 dimensions for 8 keys, 2 and 3 the same for the next 8.
  const std::uint32_t lane_row = keys + ((lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      std::uint32_t k[4];
      ldmatrix_x4(k, lane_row + (n * 8 * kStride + d * 16) * 2);
      mma_16x8x16<T>(s[n], q[d], k[0], k[1]);
      mma_16x8x16<T>(s[n + 1], q[d], k[2], k[3]);
    }
  }
}

// Scores of keys that a row does not see become -infinity.
__device__ inline void mask(float (&s)[kKeys / 8][4], const Work& work, int first_key, bool causal) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int position = work.first_position + warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
      if (key >= work.num_keys || (causal && key > position + i / 2 * 8)) s[n][i] = -INFINITY;
    }
  }
}

// A warp's running softmax and output: each thread has rows lane / 4 and lane / 4 + 8.
template <int kHeadDim>
struct Accumulator {
  float out[kHeadDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // of this thread's own keys

  // s becomes the softmax weights, relative to the maximum so far.
  __device__ void softmax(float (&s)[kKeys / 8][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      const float shift = highest == -INFINITY ? 0.0f : highest * scale_log2;
      const float correction = exp2_approx(maximum[r] * scale_log2 - shift);
      maximum[r] = highest;
      sum[r] *= correction;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          s[n][i] = exp2_approx(s[n][i] * scale_log2 - shift);
          sum[r] += s[n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[n][2 * r] *= correction;
        out[n][2 * r + 1] *= correction;
      }
    }
  }

  template <class T>
  __device__ void add_values(const float (&s)[kKeys / 8][4], std::uint32_t values) {
    constexpr int kStride = Shared<kHeadDim>::kStride;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    // Matrices 0 and 1 are 16 keys of 8 dimensions, 2 and 3 the same for the next 8 dimensions.
    const std::uint32_t lane_row = values + ((lane / 8 % 2 * 8 + lane % 8) * kStride + lane / 16 * 8) * 2;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const float (&left)[4] = s[2 * k], (&right)[4] = s[2 * k + 1];
      const std::uint32_t weights[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                                        pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 2) {
        std::uint32_t v[4];
        ldmatrix_x4_trans(v, lane_row + (k * 16 * kStride + n * 8) * 2);
        mma_16x8x16<T>(out[n], weights, v[0], v[1]);
        mma_16x8x16<T>(out[n + 1], weights, v[2], v[3]);
      }
    }
  }

  // Divides by the sums and writes the warp's rows, through its part of shared memory for whole 16-byte accesses.
  template <class T>
  __device__ void write(const AttentionParams& p, const Work& work, T* shared) {
    constexpr int kPiecesPerRow = kHeadDim / 8, kStride = Shared<kHeadDim>::kStride;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    T* rows = shared + warp * 16 * kStride;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const float factor = 1.0f / total;
      T* row = rows + (lane / 4 + 8 * r) * kStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const std::uint32_t pair = pack<T>(out[n][2 * r] * factor, out[n][2 * r + 1] * factor);
        *reinterpret_cast<std::uint32_t*>(row + n * 8) = pair;
      }
    }
    __syncwarp();
    for (int piece = lane; piece < 16 * kPiecesPerRow; piece += kWarpSize) {
      const int row = piece / kPiecesPerRow, column = piece % kPiecesPerRow * 8;
      if (warp * 16 + row >= work.num_rows) break;
      const std::int64_t token = work.first_token + warp * 16 + row;
      T* target = static_cast<T*>(p.out) + (token * p.num_heads + work.head) * kHeadDim + column;
      store(target, load<8>(rows + row * kStride + column));
    }
  }
};

template <class T, int kHeadDim, bool kPaged>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ AttentionParams p) {
  Work work;
  if (!find_work(p, work)) return;
  constexpr int kStride = Shared<kHeadDim>::kStride, kTileBytes = Shared<kHeadDim>::kTileElements * 2;
  const std::uint32_t shared = shared_address(dynamic_shared());
  const auto stage = [&](int tile) { return shared + tile % 2 * 2 * kTileBytes; };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;

  load_queries<T, kHeadDim>(p, work, stage(1));
  cp_async_commit();
  load_keys<T, kHeadDim, kPaged>(p, work, 0, stage(0));
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  std::uint32_t q[kHeadDim / 16][4];
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    ldmatrix_x4(q[d], stage(1) + ((warp * 16 + lane % 16) * kStride + d * 16 + lane / 16 * 8) * 2);
  }

  Accumulator<kHeadDim> accumulator;
  const float scale_log2 = p.scale * kLog2E;
  const int num_tiles = (work.end_key + kKeys - 1) / kKeys;
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and everyone is done with the other stage
    if (tile + 1 < num_tiles) load_keys<T, kHeadDim, kPaged>(p, work, (tile + 1) * kKeys, stage(tile + 1));
    cp_async_commit();
    float s[kKeys / 8][4];
    multiply_keys<T, kHeadDim>(s, q, stage(tile));
    const int end = (tile + 1) * kKeys;
    if (end > work.num_keys || (p.causal && end > work.first_position + warp * 16 + 1)) {
      mask(s, work, tile * kKeys, p.causal);
    }
    accumulator.softmax(s, scale_log2);
    accumulator.template add_values<T>(s, stage(tile) + kTileBytes);
  }
  cp_async_wait<0>();  // the last, empty group
  __syncthreads();     // everyone is done with the keys
  accumulator.template write<T>(p, work, reinterpret_cast<T*>(dynamic_shared()));
}

}  // namespace prefill

template <int kHeadDim>
void run_attention(const AttentionParams& p, Stream stream) {
  const char* op = p.k ? "attention" : "attention_extend";
  // Tiles of all sequences, each with at most one that is not full. Who finds no rows leaves at once.
  const std::int64_t num_tiles = ceil_div(p.num_tokens, prefill::kRows) + p.num_seqs;
  const dim3 grid(static_cast<unsigned>(p.num_heads), static_cast<unsigned>(p.num_tokens ? num_tiles : 0));
  dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel =
        p.k ? prefill::attention_kernel<T, kHeadDim, false> : prefill::attention_kernel<T, kHeadDim, true>;
    launch(op, kernel, grid, dim3(prefill::kThreads), prefill::Shared<kHeadDim>::kBytes, stream, p);
  });
}

}  // namespace dpn::cuda
