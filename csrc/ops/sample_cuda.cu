#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/sample.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kNone = 0x7FFFFFFF;

struct Candidate {
  float logit;
  int token;  // kNone: nothing but NaN so far
};

// The larger of two, the first token of equal ones.
__device__ Candidate better(Candidate a, Candidate b) {
  return b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

__device__ Candidate best_of_warp(Candidate mine) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const float logit = __shfl_xor_sync(kAllLanes, mine.logit, step);
    mine = better(mine, {logit, __shfl_xor_sync(kAllLanes, mine.token, step)});
  }
  return mine;
}

// A block takes one row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) sample_greedy_kernel(SampleParams p) {
  __shared__ float logits[kWarps];
  __shared__ int tokens[kWarps], is_finite[kWarps];
  const T* row = static_cast<const T*>(p.logits) + blockIdx.x * p.logits_stride;
  Candidate best{-INFINITY, kNone};
  bool finite = true;
  for (int first = static_cast<int>(threadIdx.x) * kWidth; first < p.vocab_size; first += kThreads * kWidth) {
    float values[kWidth];
    to_floats(values, load<kWidth>(row + first));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      best = better(best, {values[i], first + i});
      finite = finite && fabsf(values[i]) < INFINITY;  // NaN is not
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  best = best_of_warp(best);
  const bool warp_is_finite = __ballot_sync(kAllLanes, finite) == kAllLanes;
  if (lane == 0) {
    logits[warp] = best.logit;
    tokens[warp] = best.token;
    is_finite[warp] = warp_is_finite;
  }
  __syncthreads();
  if (warp != 0) return;
  best = best_of_warp({logits[lane], tokens[lane]});
  const bool row_is_finite = __ballot_sync(kAllLanes, is_finite[lane] != 0) == kAllLanes;
  if (lane == 0) {
    p.tokens[blockIdx.x] = best.token == kNone ? 0 : best.token;
    p.is_finite[blockIdx.x] = row_is_finite;
  }
}

}  // namespace

void sample_greedy_kernel(const SampleParams& p, Stream stream) {
  static_assert(kWarps == kWarpSize, "the last reduction is one warp's");
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide =
        p.vocab_size % kWidest<T> == 0 && is_aligned(p.logits) && is_aligned_stride(p.logits_stride, p.dtype);
    const auto kernel = is_wide ? sample_greedy_kernel<T, kWidest<T>> : sample_greedy_kernel<T, 1>;
    launch("sample_greedy", kernel, dim3(static_cast<unsigned>(p.num_rows)), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace dpn::cuda
