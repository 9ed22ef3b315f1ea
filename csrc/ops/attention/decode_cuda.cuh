// Attention of one query row per sequence over paged keys and values. Reading these takes most of the time, so every
// key and value is read once for all query heads that share it, 16 bytes at a time, with several keys in flight. A few
// lanes share a key. A warp goes through its own keys with an online softmax, and the warps merge at the end. Where the
// batch is small, the keys of a sequence are split over several blocks, and a second kernel merges the parts.
#pragma once

#include <bit>

#include "core/cuda_launch.cuh"
#include "core/cuda_ptx.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/attention/attention_cuda.h"
#include "ops/attention/decode_splits.h"
#include "ops/attention/paged_rows_cuda.cuh"

namespace dpn::cuda {

namespace decode {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMostHeads = 8;  // query heads of a block; larger groups read keys and values again, from the L2 cache

// Number of lanes that share a key, a power of two. Each lane has 8 dimensions; where head_dim is no power of two the
// last lanes have none.
template <int kHeadDim>
constexpr int kLanesPerKey = static_cast<int>(std::bit_ceil(static_cast<unsigned>(kHeadDim / 8)));

// A partial softmax: the sum of values weighted by 2^(score - maximum), and the sum of these weights.
struct Part {
  float values[8];
  float maximum = -INFINITY;
  float sum = 0;
};

// Factors that rescale two parts to their common maximum; the factor of a part without keys is 0.
__device__ inline float rescale(float maximum, float common) {
  return maximum == -INFINITY ? 0.0f : exp2_approx(maximum - common);
}

__device__ inline void merge(Part& part, float maximum, float sum, const float (&values)[8]) {
  const float common = fmaxf(part.maximum, maximum);
  const float mine = rescale(part.maximum, common), theirs = rescale(maximum, common);
  part.maximum = common;
  part.sum = part.sum * mine + sum * theirs;
#pragma unroll
  for (int i = 0; i < 8; ++i) part.values[i] = part.values[i] * mine + values[i] * theirs;
}

// The first key that a sequence's row sees.
__device__ inline int first_seen(const AttentionDecodeParams& p, int sequence) {
  return p.first_keys ? p.first_keys[sequence] : 0;
}

// Number of keys in each part of the `num_keys` of a sequence that are seen. The last part with keys may have fewer;
// parts after it have none.
__device__ inline int split_size(const AttentionDecodeParams& p, int num_keys) {
  return max(kShortestSplit, (num_keys + p.num_splits - 1) / p.num_splits);
}

// Writes zeros for a sequence without keys, with which a batch may be padded.
__device__ inline float finished(float value, float sum) { return sum == 0.0f ? 0.0f : value / sum; }

template <int kHeadDim, int kHeads>
struct Shared {
  float values[kWarps][kHeads][kHeadDim];
  float maximum[kWarps][kHeads];
  float sum[kWarps][kHeads];
};

// Least number of blocks per multiprocessor, which the registers allow. Without this ptxas aims at one more and spills.
template <int kHeads>
constexpr int kBlocks = kHeads <= 2   ? 4
                        : kHeads == 4 ? 3
                                      : 2;

// Merges the lanes of each warp, which have had different keys, and writes the result to shared memory.
template <int kHeadDim, int kHeads>
__device__ void merge_lanes(Part (&part)[kHeads], Shared<kHeadDim, kHeads>& shared) {
  constexpr int kLanes = kLanesPerKey<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int column = lane % kLanes * 8;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int step = kLanes; step < kWarpSize; step *= 2) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = __shfl_xor_sync(kAllLanes, part[h].values[i], step);
      const float maximum = __shfl_xor_sync(kAllLanes, part[h].maximum, step);
      const float sum = __shfl_xor_sync(kAllLanes, part[h].sum, step);
      merge(part[h], maximum, sum, values);
    }
    if (lane < kLanes && column < kHeadDim) {
#pragma unroll
      for (int i = 0; i < 8; ++i) shared.values[warp][h][column + i] = part[h].values[i];
      shared.maximum[warp][h] = part[h].maximum;
      shared.sum[warp][h] = part[h].sum;
    }
  }
}

// Merges the warps and writes the block's heads, from `first_head` on, to out or to the partial of this split.
template <class T, int kHeadDim, int kHeads>
__device__ void write_heads(const AttentionDecodeParams& p, const Shared<kHeadDim, kHeads>& shared, int sequence,
                            int first_head, int num_heads) {
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * kHeadDim; i += kThreads) {
    const int h = i / kHeadDim, dim = i % kHeadDim;
    float maximum = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, shared.maximum[w][h]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = rescale(shared.maximum[w][h], maximum);
      sum += shared.sum[w][h] * factor;
      value += shared.values[w][h][dim] * factor;
    }
    const std::int64_t row = sequence * p.num_heads + first_head + h;
    if (p.num_splits == 1) {
      static_cast<T*>(p.out)[row * kHeadDim + dim] = from_float<T>(finished(value, sum));
      continue;
    }
    float* partial = p.partials + (row * p.num_splits + blockIdx.z) * (kHeadDim + 2);
    partial[dim] = value;
    if (dim == 0) {
      partial[kHeadDim] = maximum;
      partial[kHeadDim + 1] = sum;
    }
  }
}

// A block takes kHeads query heads of one key/value head, and a part of the keys: grid (head groups, num_seqs, splits).
template <class T, int kHeadDim, int kHeads>
__global__ void __launch_bounds__(kThreads, kBlocks<kHeads>)
    attention_decode_kernel(const __grid_constant__ AttentionDecodeParams p) {
  constexpr int kLanes = kLanesPerKey<kHeadDim>, kKeysAtOnce = kWarpSize / kLanes;
  constexpr int kUnroll = kHeads <= 2 ? 4 : 2;
  __shared__ Shared<kHeadDim, kHeads> shared;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads), parts = (group + kHeads - 1) / kHeads;
  const int sequence = static_cast<int>(blockIdx.y), kv_head = static_cast<int>(blockIdx.x) / parts;
  const int first_in_group = static_cast<int>(blockIdx.x) % parts * kHeads;
  const int num_heads = min(kHeads, group - first_in_group), first_head = kv_head * group + first_in_group;
  const int column = lane % kLanes * 8;
  const bool has_column = column < kHeadDim;

  const int context = p.context_lens[sequence], begin_key = first_seen(p, sequence);
  const int size = split_size(p, context - begin_key);
  const int first_key = min(context, begin_key + static_cast<int>(blockIdx.z) * size);
  const int last_key = min(context, first_key + size);
  if (blockIdx.z > 0 && first_key == context) return;

  // Lanes without a column read column 0; their part of q is 0, so what they read does not matter.
  const PagedRows<T, kHeadDim> rows(p.paged, static_cast<int>(p.num_kv_heads), sequence, kv_head,
                                    has_column ? column : 0);

  float q[kHeads][8];
  Part part[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < 8; ++i) q[h][i] = part[h].values[i] = 0;
    if (h >= num_heads || !has_column) continue;
    const T* source = static_cast<const T*>(p.q) + sequence * p.q_stride[0] + (first_head + h) * p.q_stride[1] + column;
    to_floats(q[h], load<8>(source));
#pragma unroll
    for (int i = 0; i < 8; ++i) q[h][i] *= p.scale * kLog2E;
  }

  // Every lane of a warp takes the same number of turns, since lanes exchange scores.
  for (int begin = first_key + warp * kKeysAtOnce * kUnroll; begin < last_key;
       begin += kWarps * kKeysAtOnce * kUnroll) {
    // Starts all loads of the block table, then all loads of keys and values, before the first result is used. In place
    // of keys after the last one, the last one is read again and gets weight 0.
    typename PagedRows<T, kHeadDim>::Place places[kUnroll];
    bool is_valid[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int index = begin + u * kKeysAtOnce + lane / kLanes;
      is_valid[u] = index < last_key;
      places[u] = rows.place(min(index, last_key - 1));
    }
    Vector<T, 8> keys[kUnroll], values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const T* key = rows.key(places[u]);
      keys[u] = load<8>(key);
      values[u] = load<8>(rows.value(key));
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float scores[kUnroll], highest = part[h].maximum;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) score += q[h][i] * to_float(keys[u].elements[i]);
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(kAllLanes, score, step);
        scores[u] = is_valid[u] ? score : -INFINITY;
        highest = fmaxf(highest, scores[u]);
      }
      const float shift = highest == -INFINITY ? 0.0f : highest, correction = exp2_approx(part[h].maximum - shift);
      part[h].maximum = highest;
      part[h].sum *= correction;
#pragma unroll
      for (int i = 0; i < 8; ++i) part[h].values[i] *= correction;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = exp2_approx(scores[u] - shift);
        part[h].sum += weight;
#pragma unroll
        for (int i = 0; i < 8; ++i) part[h].values[i] += weight * to_float(values[u].elements[i]);
      }
    }
  }

  merge_lanes(part, shared);
  __syncthreads();
  write_heads<T>(p, shared, sequence, first_head, num_heads);
}

// Merges the splits of a head; one thread per dimension. grid (num_heads, num_seqs).
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) merge_splits_kernel(const __grid_constant__ AttentionDecodeParams p) {
  static_assert(kHeadDim <= kThreads);
  const int dim = static_cast<int>(threadIdx.x);
  if (dim >= kHeadDim) return;
  const std::int64_t row = blockIdx.y * p.num_heads + blockIdx.x;
  const float* partials = p.partials + row * p.num_splits * (kHeadDim + 2);
  const int num_keys = p.context_lens[blockIdx.y] - first_seen(p, static_cast<int>(blockIdx.y));
  const int size = split_size(p, num_keys);
  const int num_splits = (num_keys + size - 1) / size;  // number of splits that have keys
  float maximum = -INFINITY, sum = 0, value = 0;
#pragma unroll 8
  for (int s = 0; s < num_splits; ++s) maximum = fmaxf(maximum, partials[s * (kHeadDim + 2) + kHeadDim]);
#pragma unroll 8
  for (int s = 0; s < num_splits; ++s) {
    const float* partial = partials + s * (kHeadDim + 2);
    const float factor = rescale(partial[kHeadDim], maximum);
    sum += partial[kHeadDim + 1] * factor;
    value += partial[dim] * factor;
  }
  static_cast<T*>(p.out)[row * kHeadDim + dim] = from_float<T>(finished(value, sum));
}

template <class T, int kHeadDim, int kHeads>
void run(const AttentionDecodeParams& p, Stream stream) {
  const std::int64_t groups = p.num_kv_heads * ceil_div(p.num_heads / p.num_kv_heads, kHeads);
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(p.num_seqs),
                  static_cast<unsigned>(p.num_splits));
  launch("attention_decode", attention_decode_kernel<T, kHeadDim, kHeads>, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace decode

template <int kHeadDim>
void run_attention_decode(const AttentionDecodeParams& p, Stream stream) {
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (group == 1) {
      decode::run<T, kHeadDim, 1>(p, stream);
    } else if (group == 2) {
      decode::run<T, kHeadDim, 2>(p, stream);
    } else if (group <= 4) {
      decode::run<T, kHeadDim, 4>(p, stream);
    } else {
      decode::run<T, kHeadDim, decode::kMostHeads>(p, stream);
    }
    if (p.num_splits == 1) return;
    const dim3 grid(static_cast<unsigned>(p.num_heads), static_cast<unsigned>(p.num_seqs));
    launch("attention_decode", decode::merge_splits_kernel<T, kHeadDim>, grid, dim3(decode::kThreads), 0, stream, p);
  });
}

}  // namespace dpn::cuda
