// The router in two launches. The first computes the features of every sequence. The second computes the hidden layer,
// cut into blocks of units and columns so large that reads of weights and features from the L2 cache do not limit the
// FMAs. The last block of a group of units adds up its columns, and the last group computes the probabilities.
//
// The order of sums depends only on the sizes of the router, so a sequence gets the same result in any batch.
#include "core/cuda_launch.cuh"
#include "core/cuda_ptx.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/activation/functions_cuda.cuh"
#include "ops/reduction/route.h"

namespace dpn::cuda {

namespace {

constexpr int kFeatureThreads = 1024;
constexpr float kTemperature = 10.0f;

// Sizes of the hidden layer's blocks. A warp computes 8 units for 16 sequences: from registers it uses each loaded
// weight 16 times and each feature 8 times. A block has 32 units and 32 sequences at a time.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kUnits = 8;
constexpr int kSequences = 16;
constexpr int kUnitWarps = kRouterUnits / kUnits;
constexpr int kSequencesAtOnce = kWarps / kUnitWarps * kSequences;
constexpr int kSums = kUnits * kSequences;

// The probabilities and the choice of a sequence whose logits are in `probs`: softmax(logits / 10) with its bias, and
// the largest logit, of equal ones the first. A NaN never counts as larger, so the choice is always a valid expert.
__device__ void choose(const RouteParams& p, int sequence) {
  float* probs = p.probs + sequence * p.num_experts;
  const float bias = p.biases ? p.biases[sequence] : 0.0f;
  float highest = 0;
  int best = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    if (p.biases) probs[e] += bias * static_cast<float>(p.levels[e]);
    if (e == 0 || probs[e] > highest) {
      highest = probs[e];
      best = e;
    }
  }
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

__device__ float sum_of_block(float value, float* partial) {
  __syncthreads();  // threads may still be reading `partial` for the previous sum
  return block_sum(value, partial, kFeatureThreads / kWarpSize);
}

// A block computes the mean of the router rows of one sequence. With a hidden layer it normalises the mean; without one
// it computes the probabilities too.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads) router_features_kernel(const __grid_constant__ RouteParams p) {
  __shared__ float partial[kWarpSize];
  const int sequence = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int begin = p.cu_router_rows[sequence], end = p.cu_router_rows[sequence + 1];
  float* features = p.features + sequence * p.hidden_size;
  float* probs = p.probs + sequence * p.num_experts;
  if (sequence == 0 && p.hidden_weight) {
    for (std::int64_t i = thread; i <= num_router_groups(p.router_size); i += kFeatureThreads) p.finished[i] = 0;
  }
  if (begin == end) {
    for (int e = thread; e < p.num_experts; e += kFeatureThreads) probs[e] = 0;
    if (thread == 0) p.experts[sequence] = -1;
    for (std::int64_t i = thread; i < p.hidden_size; i += kFeatureThreads) features[i] = 0;
    return;
  }
  float sum = 0;
  for (std::int64_t i = thread; i < p.hidden_size; i += kFeatureThreads) {
    float value = 0;
    for (int row = begin; row < end; ++row) {
      value += to_float(static_cast<const T*>(p.hidden)[p.router_rows[row] * p.hidden_stride + i]);
    }
    value /= static_cast<float>(end - begin);
    features[i] = value;  // only this thread reads it again
    sum += value;
  }
  if (p.hidden_weight) {
    const float size = static_cast<float>(p.hidden_size), mean = sum_of_block(sum, partial) / size;
    float squares = 0;
    for (std::int64_t i = thread; i < p.hidden_size; i += kFeatureThreads) {
      squares += (features[i] - mean) * (features[i] - mean);
    }
    const float scale = 1.0f / sqrtf(sum_of_block(squares, partial) / size + p.eps);
    for (std::int64_t i = thread; i < p.hidden_size; i += kFeatureThreads) {
      features[i] = (features[i] - mean) * scale * p.norm_weight[i] + p.norm_bias[i];
    }
    return;
  }
  for (int e = 0; e < p.num_experts; ++e) {
    float logit = 0;
    for (std::int64_t i = thread; i < p.hidden_size; i += kFeatureThreads) {
      logit += features[i] * p.predictor[e * p.hidden_size + i];
    }
    logit = sum_of_block(logit, partial);
    if (thread == 0) probs[e] = logit;
  }
  if (thread == 0) choose(p, sequence);
}

// Sums kCount values over the lanes of a warp and distributes the sums: lane l gets kCount / 32 of them, from number
// l * kCount / 32 on. kStep is for the recursion.
template <int kCount, int kSize, int kStep = kWarpSize / 2>
__device__ void scatter_sums(float (&values)[kSize]) {
  const bool is_upper = threadIdx.x & kStep;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float sent = is_upper ? values[i] : values[i + kCount / 2];
    values[i] = (is_upper ? values[i + kCount / 2] : values[i]) + __shfl_xor_sync(kAllLanes, sent, kStep);
  }
  if constexpr (kStep > 1) scatter_sums<kCount / 2, kSize, kStep / 2>(values);
}

// sums[s * kUnits + u]: products of a warp's sequences and units over the columns `begin` to `end`. `units` and
// `sequences` are the first of each. In place of rows after the last one, the last row is read again.
template <int kWidth>
__device__ void multiply(float (&sums)[kSums], const RouteParams& p, int units, int sequences, int begin, int end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int last_unit = static_cast<int>(p.router_size) - 1, last_sequence = static_cast<int>(p.num_seqs) - 1;
  const int stride = static_cast<int>(p.hidden_size) * 4;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
#pragma unroll 1
  for (int column = begin + lane * kWidth; column < end; column += kWarpSize * kWidth) {
    float weights[kUnits][kWidth];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      to_floats(weights[u], load<kWidth>(offset_bytes(p.hidden_weight + column, min(units + u, last_unit), stride)));
    }
#pragma unroll
    for (int s = 0; s < kSequences; ++s) {
      float features[kWidth];
      to_floats(features, load<kWidth>(offset_bytes(p.features + column, min(sequences + s, last_sequence), stride)));
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sums[s * kUnits + u] += weights[u][i] * features[i];
      }
    }
  }
}

// Counts the block as finished. True in the last of `count` blocks, which sees what the others wrote before.
//
// One thread orders memory for its block: the barriers carry the order from and to the block's other threads. The
// release lets a block that sees the count see the writes before it too, and the acquire keeps the last block from
// reading older values, of its L1 cache for example. A __threadfence() by every thread before the count would be dearer
// (it is sequentially consistent, and each warp would wait for its own) and no acquire.
__device__ bool is_last_of(std::uint32_t* finished, unsigned count, bool& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared = add_acq_rel(finished, 1u) == count - 1;
  __syncthreads();
  return shared;
}

// Computes what a group of units adds to the logits of every sequence.
__device__ void add_up_group(const RouteParams& p, int group) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t unit = static_cast<std::int64_t>(group) * kRouterUnits + lane;
  const std::int64_t width = num_router_groups(p.router_size) * kRouterUnits;
  for (int sequence = warp; sequence < p.num_seqs; sequence += kWarps) {
    float sum = 0;
#pragma unroll 4
    for (unsigned split = 0; split < gridDim.y; ++split) {
      sum += p.activations[(split * p.num_seqs + sequence) * width + unit];
    }
    const float activation = gelu(sum);  // for units after the last one it is not used: their weight is 0
    for (int e = 0; e < p.num_experts; ++e) {
      const float weight = unit < p.router_size ? p.predictor[e * p.router_size + unit] : 0.0f;
      const float logit = warp_sum(activation * weight);
      if (lane == 0) p.logits[(group * p.num_seqs + sequence) * p.num_experts + e] = logit;
    }
  }
}

// grid (groups of units, parts of the columns).
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1) router_hidden_kernel(const __grid_constant__ RouteParams p) {
  static_assert(kRouterUnits == kWarpSize, "a lane for each unit of a group");
  __shared__ bool is_last;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int group = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int begin = split * kRouterColumns, end = min(begin + kRouterColumns, static_cast<int>(p.hidden_size));
  const int num_seqs = static_cast<int>(p.num_seqs), units = warp % kUnitWarps * kUnits;
  const std::int64_t width = static_cast<std::int64_t>(gridDim.x) * kRouterUnits;
  for (int first = warp / kUnitWarps * kSequences; first < num_seqs; first += kSequencesAtOnce) {
    float sums[kSums];
    multiply<kWidth>(sums, p, group * kRouterUnits + units, first, begin, end);
    scatter_sums<kSums>(sums);
    constexpr int kMine = kSums / kWarpSize;  // units of one sequence
    const int sequence = first + lane * kMine / kUnits, unit = units + lane * kMine % kUnits;
    if (sequence >= num_seqs) continue;
    float* target = p.activations + (static_cast<std::int64_t>(split) * num_seqs + sequence) * width;
#pragma unroll
    for (int i = 0; i < kMine; ++i) target[group * kRouterUnits + unit + i] = sums[i];
  }
  if (!is_last_of(p.finished + 1 + group, gridDim.y, is_last)) return;
  add_up_group(p, group);
  if (!is_last_of(p.finished, gridDim.x, is_last)) return;
  const std::int64_t num_logits = p.num_seqs * p.num_experts;
  for (std::int64_t i = threadIdx.x; i < num_logits; i += kThreads) {
    if (!is_routed(p, static_cast<int>(i / p.num_experts))) continue;
    float logit = 0;
#pragma unroll 16
    for (unsigned g = 0; g < gridDim.x; ++g) logit += p.logits[g * num_logits + i];
    p.probs[i] = logit;
  }
  __syncthreads();
  for (int sequence = static_cast<int>(threadIdx.x); sequence < num_seqs; sequence += kThreads) {
    if (is_routed(p, sequence)) choose(p, sequence);
  }
}

}  // namespace

void route_kernel(const RouteParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    launch("route", router_features_kernel<decltype(type)>, dim3(static_cast<unsigned>(p.num_seqs)),
           dim3(kFeatureThreads), 0, stream, p);
  });
  if (!p.hidden_weight || p.num_seqs == 0) return;
  const bool is_wide = p.hidden_size % 4 == 0 && is_aligned(p.hidden_weight) && is_aligned(p.features);
  const auto kernel = is_wide ? router_hidden_kernel<4> : router_hidden_kernel<1>;
  const dim3 grid(static_cast<unsigned>(num_router_groups(p.router_size)),
                  static_cast<unsigned>(num_router_splits(p.hidden_size)));
  launch("route", kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace dpn::cuda
