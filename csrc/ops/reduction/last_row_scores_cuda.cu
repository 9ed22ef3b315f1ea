// Three kernels: the first finds maximum and sum of every head's softmax over parts of the keys, the second merges the
// parts, the third computes the scores. The third reads the keys of the segments again, mostly from the L2 cache, so
// that scores of single heads are never stored. A few lanes share a key, 16 bytes each, and all query heads of a key
// head use it while it is in registers.
#include <bit>

#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_sequences.cuh"
#include "core/cuda_vector.cuh"
#include "ops/attention/decode_splits.h"
#include "ops/reduction/last_row_scores.h"

namespace dpn::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kUnroll = 4;     // number of keys that a lane loads at once
constexpr int kMostHeads = 8;  // of a block; larger groups of query heads read keys again, from the L2 cache

// How the lanes of a warp share keys. Where head_dim is not a power of two, some lanes have no column of their own:
// they read column 0 and multiply it by zeros.
template <class T>
struct Lanes {
  int per_key;  // number of lanes of a key, a power of two
  int keys;     // number of keys that the warp reads at once
  int key;      // index of this lane's key among them
  int column;   // first element of this lane's part of a key
  bool has_column;

  __device__ explicit Lanes(const LastRowScoresParams& p, int log_per_key) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    per_key = 1 << log_per_key;
    keys = kWarpSize >> log_per_key;
    key = lane >> log_per_key;
    const int own = (lane & (per_key - 1)) * kWidest<T>;
    has_column = own < p.head_dim;
    column = has_column ? own : 0;
  }

  // The sum over the lanes of a key, in each of them.
  __device__ float sum(float value) const {
    for (int step = per_key / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
  }
};

// The row of key number `index` of the query, key head 0.
template <class T>
__device__ const T* key_row(const LastRowScoresParams& p, int query, int index) {
  if (p.cu_seqlens) return static_cast<const T*>(p.k) + (p.cu_seqlens[query] + index) * p.k_stride[0];
  const int entry = p.paged.block_divisor.divide(index);
  const std::int64_t block = p.paged.block_table[query * p.paged.max_blocks + entry];
  const std::int64_t plane = p.num_kv_heads * p.paged.block_size * p.head_dim;
  return static_cast<const T*>(p.paged.kv_cache) +
         (block * p.paged.layers_per_block + p.paged.layer_in_block) * 2 * plane +
         (index - entry * p.paged.block_size) * p.head_dim;
}

__device__ inline std::int64_t key_head_stride(const LastRowScoresParams& p) {
  return p.cu_seqlens ? p.k_stride[1] : p.paged.block_size * p.head_dim;
}

__device__ inline int num_keys(const LastRowScoresParams& p, int query) {
  return p.cu_seqlens ? p.cu_seqlens[query + 1] - p.cu_seqlens[query] : p.kv_lengths[query];
}

// The first key that a query sees.
__device__ inline int first_seen(const LastRowScoresParams& p, int query) {
  return p.first_keys ? p.first_keys[query] : 0;
}

// Whether the key of a score comes before the first one that its query sees.
__device__ inline bool is_hidden(const LastRowScoresParams& p, int score_index) {
  const Segments& segments = p.segments;
  const int segment = sequence_of_row(segments.cu_scores, static_cast<int>(segments.num_segments), score_index);
  const int index = segments.starts[segment] + score_index - segments.cu_scores[segment];
  return index < p.first_keys[segments.queries[segment]];
}

// Loads this lane's part of a query head, scaled so that scores are exponents of 2.
template <class T>
__device__ void load_query(float (&q)[kWidest<T>], const LastRowScoresParams& p, const Lanes<T>& lanes, int query,
                           int head) {
  const T* row = static_cast<const T*>(p.q) + query * p.q_stride[0] + head * p.q_stride[1];
  to_floats(q, load<kWidest<T>>(row + lanes.column));
#pragma unroll
  for (int i = 0; i < kWidest<T>; ++i) q[i] = lanes.has_column ? q[i] * (p.scale * kLog2E) : 0.0f;
}

template <class T>
__device__ float score(const Lanes<T>& lanes, const float (&q)[kWidest<T>], const Vector<T, kWidest<T>>& key) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWidest<T>; ++i) sum += q[i] * to_float(key.elements[i]);
  return lanes.sum(sum);
}

// Whether a row of the query gets a score; the same in every thread.
__device__ inline bool has_scores(const Segments& segments, int query) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int first = 0; first < segments.num_segments; first += kWarpSize) {
    const int s = first + lane;
    const bool is_mine =
        s < segments.num_segments && segments.queries[s] == query && segments.cu_scores[s + 1] > segments.cu_scores[s];
    if (__ballot_sync(kAllLanes, is_mine) != 0) return true;
  }
  return false;
}

// Number of keys of each part of the `count` keys that a query sees. The last part may have fewer, and parts after it
// have none.
__device__ inline int split_size(const LastRowScoresParams& p, int count) {
  return max(kShortestSplit, (count + p.num_splits - 1) / p.num_splits);
}

// The factor 2^(maximum - common), but 0 for a part without keys or with -infinity alone.
__device__ inline float rescale(float maximum, float common) {
  return maximum == -INFINITY ? 0.0f : exp2_approx(maximum - common);
}

// Unfinished softmaxes. The first lane of each key has one for every head.
struct PartSums {
  float maximum[kMostHeads][kWarps][kWarpSize];
  float sum[kMostHeads][kWarps][kWarpSize];
};

// A block takes up to kMostHeads query heads of one key head, and a part of the keys: grid (head groups, num_queries,
// splits).
template <class T>
__global__ void __launch_bounds__(kThreads)
    last_row_parts_kernel(const __grid_constant__ LastRowScoresParams p, int log_lanes) {
  __shared__ PartSums shared;
  const int query = static_cast<int>(blockIdx.y), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads), parts = (group + kMostHeads - 1) / kMostHeads;
  const int kv_head = static_cast<int>(blockIdx.x) / parts;
  const int first_in_group = static_cast<int>(blockIdx.x) % parts * kMostHeads;
  const int num_heads = min(kMostHeads, group - first_in_group), first_head = kv_head * group + first_in_group;
  const int length = num_keys(p, query), begin_key = first_seen(p, query), size = split_size(p, length - begin_key);
  const int first_key = begin_key + static_cast<int>(blockIdx.z) * size, last_key = min(length, first_key + size);
  if (first_key >= length || !has_scores(p.segments, query)) return;

  const Lanes<T> lanes(p, log_lanes);
  const bool is_first = static_cast<int>(threadIdx.x) % lanes.per_key == 0;
  if (is_first) {
    for (int h = 0; h < num_heads; ++h) {
      shared.maximum[h][warp][lanes.key] = -INFINITY;
      shared.sum[h][warp][lanes.key] = 0;
    }
  }
  const std::int64_t offset = kv_head * key_head_stride(p) + lanes.column;
  // The same number of turns for every lane of a warp, since they exchange products.
  for (int begin = first_key + warp * lanes.keys * kUnroll; begin < last_key; begin += kWarps * lanes.keys * kUnroll) {
    Vector<T, kWidest<T>> keys[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // lanes after the last key read it again
      const int index = min(begin + u * lanes.keys + lanes.key, last_key - 1);
      keys[u] = load<kWidest<T>>(key_row<T>(p, query, index) + offset);
    }
    for (int h = 0; h < num_heads; ++h) {
      float q[kWidest<T>], scores[kUnroll];
      load_query<T>(q, p, lanes, query, first_head + h);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        scores[u] = score<T>(lanes, q, keys[u]);
        if (begin + u * lanes.keys + lanes.key >= last_key) scores[u] = -INFINITY;
      }
      if (!is_first) continue;
      float& maximum = shared.maximum[h][warp][lanes.key];
      float& sum = shared.sum[h][warp][lanes.key];
      float highest = maximum;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) highest = fmaxf(highest, scores[u]);
      float total = sum * rescale(maximum, highest);
      const float shift = highest == -INFINITY ? 0.0f : highest;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) total += exp2_approx(scores[u] - shift);
      maximum = highest;
      sum = total;
    }
  }
  __syncthreads();
  const int h = static_cast<int>(threadIdx.x);
  if (h >= num_heads) return;
  float maximum = -INFINITY, sum = 0;
  for (int i = 0; i < kWarps * lanes.keys; ++i)
    maximum = fmaxf(maximum, shared.maximum[h][i / lanes.keys][i % lanes.keys]);
  for (int i = 0; i < kWarps * lanes.keys; ++i) {
    const int w = i / lanes.keys, key = i % lanes.keys;
    sum += shared.sum[h][w][key] * rescale(shared.maximum[h][w][key], maximum);
  }
  float* partial = p.partials + ((query * p.num_heads + first_head + h) * p.num_splits + blockIdx.z) * 2;
  partial[0] = maximum;
  partial[1] = sum;
}

// Merges the parts of a query, a thread for each head: grid (num_queries).
__global__ void __launch_bounds__(kThreads) last_row_totals_kernel(const __grid_constant__ LastRowScoresParams p) {
  const int query = static_cast<int>(blockIdx.x), count = num_keys(p, query) - first_seen(p, query);
  if (!has_scores(p.segments, query)) return;
  const int size = split_size(p, count), num_parts = (count + size - 1) / size;
  for (int head = static_cast<int>(threadIdx.x); head < p.num_heads; head += kThreads) {
    const std::int64_t row = query * p.num_heads + head;
    const float* parts = p.partials + row * p.num_splits * 2;
    float maximum = -INFINITY, sum = 0;
    for (int i = 0; i < num_parts; ++i) maximum = fmaxf(maximum, parts[2 * i]);
    for (int i = 0; i < num_parts; ++i) sum += parts[2 * i + 1] * rescale(parts[2 * i], maximum);
    p.totals[2 * row] = maximum;
    p.totals[2 * row + 1] = 1.0f / (sum * static_cast<float>(p.num_heads));
  }
}

// Each warp of a block takes the same rows, kUnroll for each key that it reads at once, and every kWarps-th key head:
// grid (row tiles).
template <class T>
__global__ void __launch_bounds__(kThreads)
    last_row_scores_kernel(const __grid_constant__ LastRowScoresParams p, int log_lanes) {
  __shared__ float sums[kWarps][kUnroll * kWarpSize];
  const Lanes<T> lanes(p, log_lanes);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, num_segments = static_cast<int>(p.segments.num_segments);
  const int num_scores = p.segments.cu_scores[num_segments];  // a batch may have fewer than its buffer
  const int rows = kUnroll * lanes.keys, first_row = static_cast<int>(blockIdx.x) * rows;
  if (first_row >= num_scores) return;

  const T* keys[kUnroll];
  int queries[kUnroll];
  float means[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {  // lanes after the last row read it again
    const int row = min(first_row + u * lanes.keys + lanes.key, num_scores - 1);
    const int segment = sequence_of_row(p.segments.cu_scores, num_segments, row);
    queries[u] = p.segments.queries[segment];
    const int index = p.segments.starts[segment] + row - p.segments.cu_scores[segment];
    keys[u] = key_row<T>(p, queries[u], index) + lanes.column;
    means[u] = 0;
  }
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
  for (int kv_head = warp; kv_head < p.num_kv_heads; kv_head += kWarps) {
    Vector<T, kWidest<T>> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load<kWidest<T>>(keys[u] + kv_head * key_head_stride(p));
    for (int h = 0; h < group; ++h) {
      const int head = kv_head * group + h;
      float q[kWidest<T>];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u == 0 || queries[u] != queries[u - 1]) load_query<T>(q, p, lanes, queries[u], head);
        const float* total = p.totals + (queries[u] * p.num_heads + head) * 2;
        means[u] += exp2_approx(score<T>(lanes, q, loaded[u]) - total[0]) * total[1];
      }
    }
  }
  if (static_cast<int>(threadIdx.x) % lanes.per_key == 0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sums[warp][u * lanes.keys + lanes.key] = means[u];
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  if (row >= rows || first_row + row >= num_scores) return;
  float mean = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) mean += sums[w][row];
  p.out[first_row + row] = p.first_keys && is_hidden(p, first_row + row) ? 0.0f : mean;
}

template <class T>
void run(const LastRowScoresParams& p, int log_lanes, Stream stream) {
  const char* op = p.cu_seqlens ? "last_row_scores" : "last_row_scores_paged";
  const std::int64_t groups = p.num_kv_heads * ceil_div(p.num_heads / p.num_kv_heads, kMostHeads);
  const auto num_queries = static_cast<unsigned>(p.num_queries);
  launch(op, last_row_parts_kernel<T>,
         dim3(static_cast<unsigned>(groups), num_queries, static_cast<unsigned>(p.num_splits)), dim3(kThreads), 0,
         stream, p, log_lanes);
  launch(op, last_row_totals_kernel, dim3(num_queries), dim3(kThreads), 0, stream, p);
  const std::int64_t rows = kUnroll * (kWarpSize >> log_lanes);
  launch(op, last_row_scores_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.num_scores, rows))), dim3(kThreads), 0,
         stream, p, log_lanes);
}

}  // namespace

void last_row_scores_kernel(const LastRowScoresParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    Checker(p.cu_seqlens ? "last_row_scores" : "last_row_scores_paged")
        .range("head_dim on cuda", p.head_dim, 8, kWarpSize * kWidest<T>);
    const auto lanes = std::bit_ceil(static_cast<unsigned>(p.head_dim / kWidest<T>));
    run<T>(p, std::countr_zero(lanes), stream);
  });
}

}  // namespace dpn::cuda
