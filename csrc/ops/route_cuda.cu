// The router in two launches: features of every sequence, then the hidden layer, whose last block to finish reads the
// probabilities off. Sums are made in an order that depends on the sizes of the router alone, so a sequence gets the
// same result in any batch.
#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/gelu_cuda.cuh"
#include "ops/route.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kTemperature = 10.0f;

// A block computes 8 units of the hidden layer for 32 sequences at a time: a warp 4 of them for 8 sequences, each
// weight that it loads used 8 times and each feature 4 times from registers.
constexpr int kUnits = 4;
constexpr int kSequences = 8;
constexpr int kUnitWarps = 2;
constexpr int kSequenceWarps = kWarps / kUnitWarps;

__device__ float sum_of_block(float value, float* partial) {
  __syncthreads();  // `partial` may still be read from the sum before
  return block_sum(value, partial, kWarps);
}

// Probabilities and choice of one sequence by one warp: softmax(logits / 10) with its bias, and the first of the
// largest logits. A NaN is never larger: the choice stays a valid expert.
__device__ void predict(const RouteParams& p, int sequence, const float* input) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float* probs = p.probs + sequence * p.num_experts;
  const float bias = p.biases ? p.biases[sequence] : 0.0f;
  float highest = 0;
  int best = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    const float* weights = p.predictor + e * p.router_size;
    float sum = 0;
    for (std::int64_t i = lane; i < p.router_size; i += kWarpSize) sum += __ldcg(input + i) * weights[i];
    float logit = warp_sum(sum);
    if (p.biases) logit += bias * static_cast<float>(p.levels[e]);
    if (lane == 0) probs[e] = logit;
    if (e == 0 || logit > highest) {
      highest = logit;
      best = e;
    }
  }
  if (lane != 0) return;
  float sum = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    probs[e] = expf((probs[e] - highest) / kTemperature);
    sum += probs[e];
  }
  for (int e = 0; e < p.num_experts; ++e) probs[e] /= sum;
  p.experts[sequence] = best;
}

__device__ bool is_routed(const RouteParams& p, int sequence) {
  return p.cu_router_rows[sequence + 1] > p.cu_router_rows[sequence];
}

// A block takes one sequence: the mean of its router rows, normalised where there is a hidden layer. Without one it
// predicts at once.
template <class T>
__global__ void __launch_bounds__(kThreads) router_features_kernel(const __grid_constant__ RouteParams p) {
  __shared__ float partial[kWarpSize];
  const int sequence = static_cast<int>(blockIdx.x);
  const int begin = p.cu_router_rows[sequence], end = p.cu_router_rows[sequence + 1];
  float* features = p.features + sequence * p.hidden_size;
  if (sequence == 0 && threadIdx.x == 0 && p.finished_blocks) *p.finished_blocks = 0;
  if (begin == end) {
    for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) {
      p.probs[sequence * p.num_experts + e] = 0;
    }
    if (threadIdx.x == 0) p.experts[sequence] = -1;
    for (std::int64_t i = threadIdx.x; i < p.hidden_size; i += kThreads) features[i] = 0;
    return;
  }
  float sum = 0;
  for (std::int64_t i = threadIdx.x; i < p.hidden_size; i += kThreads) {
    float value = 0;
    for (int row = begin; row < end; ++row) {
      value += to_float(static_cast<const T*>(p.hidden)[p.router_rows[row] * p.hidden_stride + i]);
    }
    value /= static_cast<float>(end - begin);
    features[i] = value;  // read again by this thread alone
    sum += value;
  }
  if (p.hidden_weight) {
    const float size = static_cast<float>(p.hidden_size), mean = sum_of_block(sum, partial) / size;
    float squares = 0;
    for (std::int64_t i = threadIdx.x; i < p.hidden_size; i += kThreads) {
      squares += (features[i] - mean) * (features[i] - mean);
    }
    const float scale = 1.0f / sqrtf(sum_of_block(squares, partial) / size + p.eps);
    for (std::int64_t i = threadIdx.x; i < p.hidden_size; i += kThreads) {
      features[i] = (features[i] - mean) * scale * p.norm_weight[i] + p.norm_bias[i];
    }
    return;
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) predict(p, sequence, features);
}

// kWidth floats of a row from `column` on, zeros where the row or the column is not there.
template <int kWidth>
__device__ void load_row(float (&values)[kWidth], const float* matrix, std::int64_t row, std::int64_t num_rows,
                         std::int64_t column, std::int64_t num_columns) {
  Vector<float, kWidth> vector{};
  if (row < num_rows && column < num_columns) vector = load<kWidth>(matrix + row * num_columns + column);
  to_floats(values, vector);
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads) router_hidden_kernel(const __grid_constant__ RouteParams p) {
  __shared__ bool is_last;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t first_unit = (static_cast<std::int64_t>(blockIdx.x) * kUnitWarps + warp % kUnitWarps) * kUnits;
  for (std::int64_t first = warp / kUnitWarps * kSequences; first < p.num_seqs; first += kSequenceWarps * kSequences) {
    float sums[kUnits][kSequences] = {};
    for (std::int64_t column = lane * kWidth; column < p.hidden_size; column += kWarpSize * kWidth) {
      float weights[kUnits][kWidth];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        load_row(weights[u], p.hidden_weight, first_unit + u, p.router_size, column, p.hidden_size);
      }
#pragma unroll
      for (int s = 0; s < kSequences; ++s) {
        float features[kWidth];
        load_row(features, p.features, first + s, p.num_seqs, column, p.hidden_size);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sums[u][s] += weights[u][i] * features[i];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int s = 0; s < kSequences; ++s) {
        const float sum = warp_sum(sums[u][s]);
        const bool is_mine = lane == u * kSequences + s && first_unit + u < p.router_size && first + s < p.num_seqs;
        if (is_mine) p.activations[(first + s) * p.router_size + first_unit + u] = gelu(sum);
      }
    }
  }
  __threadfence();  // this thread's activations are there before the block counts as finished
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.finished_blocks, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  for (int sequence = warp; sequence < p.num_seqs; sequence += kWarps) {
    if (is_routed(p, sequence)) predict(p, sequence, p.activations + sequence * p.router_size);
  }
}

}  // namespace

void route_kernel(const RouteParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    launch("route", router_features_kernel<decltype(type)>, dim3(static_cast<unsigned>(p.num_seqs)), dim3(kThreads), 0,
           stream, p);
  });
  if (!p.hidden_weight || p.num_seqs == 0) return;
  const bool is_wide = p.hidden_size % 4 == 0 && is_aligned(p.hidden_weight) && is_aligned(p.features);
  const auto kernel = is_wide ? router_hidden_kernel<4> : router_hidden_kernel<1>;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.router_size, kUnitWarps * kUnits)));
  launch("route", kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace dpn::cuda
