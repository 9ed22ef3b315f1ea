// The work of one warp of prefill attention: scores of its query rows with a tile of keys, an online softmax, and the
// sum of values. All are in registers, in the layout of the tensor cores: of every 16 rows a thread has the rows lane /
// 4 and lane / 4 + 8.
#pragma once

#include <cstdint>

#include "core/cuda_ptx.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"

namespace dpn::cuda::prefill {

constexpr int kKeys = 32;  // keys of a tile

// Number of elements from one row in shared memory to the next. A row is padded by 16 bytes, so that the 8 rows that
// ldmatrix reads at once are in different banks.
template <int kHeadDim>
constexpr int kStride = kHeadDim + 8;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// Queries of a warp's 16 kTiles rows as left operands. With 16 rows they are kept in registers. With more rows the sums
// need these registers, and queries are read from shared memory again for every tile of keys.
template <int kHeadDim, int kTiles>
class Queries {
 public:
  // rows: the warp's first row in shared memory, [16 kTiles, kStride].
  __device__ explicit Queries(std::uint32_t rows)
      : lane_row_(rows + (lane() % 16 * kStride<kHeadDim> + lane() / 16 * 8) * 2) {
    if constexpr (kTiles == 1) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) read(kept_[d], 0, d);
    }
  }

  // The 16 rows from 16 tile on and the 16 dimensions from 16 d on.
  __device__ void get(std::uint32_t (&q)[4], int tile, int d) const {
    if constexpr (kTiles == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = kept_[d][i];
    } else {
      read(q, tile, d);
    }
  }

 private:
  __device__ void read(std::uint32_t (&q)[4], int tile, int d) const {
    ldmatrix_x4(q, lane_row_ + (tile * 16 * kStride<kHeadDim> + d * 16) * 2);
  }

  std::uint32_t lane_row_;
  std::uint32_t kept_[kTiles == 1 ? kHeadDim / 16 : 1][4];
};

// Scores of a warp's rows with a tile of keys: s[t][n] has the 16 rows from 16 t on and the 8 keys from 8 n on.
template <int kTiles>
using Scores = float[kTiles][kKeys / 8][4];

template <class T, int kHeadDim, int kTiles>
__device__ void multiply_keys(Scores<kTiles>& s, const Queries<kHeadDim, kTiles>& queries, std::uint32_t keys) {
  // Matrices 0 and 1 are two halves of 16 dimensions for 8 keys, 2 and 3 the same for the next 8.
  const std::uint32_t lane_row = keys + ((lane() / 16 * 8 + lane() % 8) * kStride<kHeadDim> + lane() / 8 % 2 * 8) * 2;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = 0;
  }
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    std::uint32_t q[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) queries.get(q[t], t, d);
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      std::uint32_t k[4];
      ldmatrix_x4(k, lane_row + (n * 8 * kStride<kHeadDim> + d * 16) * 2);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_16x8x16<T>(s[t][n], q[t], k[0], k[1]);
        mma_16x8x16<T>(s[t][n + 1], q[t], k[2], k[3]);
      }
    }
  }
}

// Sets the scores of keys that a row does not see to -infinity.
//
// last_seen: with causal attention, the last key that the warp's first row sees; each later row sees one key more.
template <int kTiles>
__device__ void mask(Scores<kTiles>& s, int first_key, int num_keys, int last_seen, bool causal) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + n * 8 + lane() % 4 * 2 + i % 2;
        const int row = t * 16 + lane() / 4 + i / 2 * 8;
        if (key >= num_keys || (causal && key > last_seen + row)) s[t][n][i] = -INFINITY;
      }
    }
  }
}

// Sets the scores of keys before the windows of rows to -infinity.
//
// first_seen: [last_row + 1] the first key that each of the warp's rows sees.
template <int kTiles>
__device__ void mask_before(Scores<kTiles>& s, int first_key, const std::int32_t* first_seen, int last_row) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int hidden = first_seen[min(t * 16 + lane() / 4 + r * 8, last_row)] - first_key - lane() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (n * 8 + i < hidden) s[t][n][2 * r + i] = -INFINITY;
        }
      }
    }
  }
}

// Running softmax and output of 16 rows.
template <int kHeadDim>
struct Accumulator {
  float out[kHeadDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // over this thread's own keys

  // Turns s into softmax weights, relative to the maximum so far.
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

  // Divides by the sums and writes 16 rows to shared memory.
  template <class T>
  __device__ void finish(T* rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const float factor = 1.0f / total;
      T* row = rows + (lane() / 4 + 8 * r) * kStride<kHeadDim> + lane() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const std::uint32_t pair = pack<T>(out[n][2 * r] * factor, out[n][2 * r + 1] * factor);
        *reinterpret_cast<std::uint32_t*>(row + n * 8) = pair;
      }
    }
  }
};

// Adds the values, weighted by s.
template <class T, int kHeadDim, int kTiles>
__device__ void add_values(Accumulator<kHeadDim> (&sums)[kTiles], const Scores<kTiles>& s, std::uint32_t values) {
  // Matrices 0 and 1 are 16 keys of 8 dimensions, 2 and 3 the same for the next 8 dimensions.
  const std::uint32_t lane_row = values + ((lane() / 8 % 2 * 8 + lane() % 8) * kStride<kHeadDim> + lane() / 16 * 8) * 2;
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    std::uint32_t weights[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float (&left)[4] = s[t][2 * k], (&right)[4] = s[t][2 * k + 1];
      weights[t][0] = pack<T>(left[0], left[1]);
      weights[t][1] = pack<T>(left[2], left[3]);
      weights[t][2] = pack<T>(right[0], right[1]);
      weights[t][3] = pack<T>(right[2], right[3]);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      std::uint32_t v[4];
      ldmatrix_x4_trans(v, lane_row + (k * 16 * kStride<kHeadDim> + n * 8) * 2);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_16x8x16<T>(sums[t].out[n], weights[t], v[0], v[1]);
        mma_16x8x16<T>(sums[t].out[n + 1], weights[t], v[2], v[3]);
      }
    }
  }
}

}  // namespace dpn::cuda::prefill
