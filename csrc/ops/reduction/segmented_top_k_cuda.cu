#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/reduction/score_rank.h"
#include "ops/reduction/segmented_top_k.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads == kDigits, "a thread has one digit of a histogram");

// The sum of the values of this thread and of those before it. `total` becomes the sum of all values. `totals` is
// shared memory, [kWarps].
__device__ int sum_up_to_here(int value, int* totals, int& total) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += lower;
  }
  if (lane == kWarpSize - 1) totals[warp] = value;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) value += totals[w];
    total += totals[w];
  }
  __syncthreads();  // before they are written again
  return value;
}

// Finds the next digit of the cut, the same in every thread. `counts` is shared memory, [kDigits].
__device__ Cut refine(const Cut& cut, int shift, const float* scores, int size, int* counts, int* totals) {
  __shared__ Cut refined;
  const int thread = static_cast<int>(threadIdx.x);
  counts[thread] = 0;
  __syncthreads();
  for (int i = thread; i < size; i += kThreads) {
    const std::uint32_t rank = rank_of(scores[i]);
    if (has_digits(rank, cut, shift)) atomicAdd(&counts[digit_of(rank, shift)], 1);
  }
  __syncthreads();
  const int digit = kDigits - 1 - thread, mine = counts[digit];  // the largest digit comes first
  int total;
  const int above = sum_up_to_here(mine, totals, total) - mine;
  if (above < cut.count && above + mine >= cut.count) {
    refined = {cut.rank | static_cast<std::uint32_t>(digit) << shift, cut.count - above};
  }
  __syncthreads();
  const Cut result = refined;
  __syncthreads();  // before it is written again
  return result;
}

// A block takes one segment.
__global__ void __launch_bounds__(kThreads) select_scores_kernel(const __grid_constant__ SegmentedTopKParams p) {
  __shared__ int counts[kDigits], totals[kWarps];
  const int segment = static_cast<int>(blockIdx.x);
  const int first = p.cu_scores[segment], size = p.cu_scores[segment + 1] - first;
  const int kept = p.cu_kept[segment + 1] - p.cu_kept[segment];
  if (kept == 0) return;
  const float* scores = p.scores + first;
  std::int32_t* out = p.out + p.cu_kept[segment];
  Cut cut{0, kept};
  for (int shift = kTopShift; shift >= 0; shift -= kDigitBits) {
    cut = refine(cut, shift, scores, size, counts, totals);
  }
  int larger = 0, ties = 0;  // before this turn's scores
  for (int begin = 0; begin < size; begin += kThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    const std::uint32_t rank = i < size ? rank_of(scores[i]) : 0;
    const bool is_larger = i < size && rank > cut.rank, is_tie = i < size && rank == cut.rank;
    // Two counts in one number: a turn has at most kThreads of each.
    int all;
    const int both = sum_up_to_here((is_larger ? 1 << 16 : 0) + (is_tie ? 1 : 0), totals, all);
    const int larger_here = larger + (both >> 16), ties_here = ties + (both & 0xFFFF);
    if (is_larger || (is_tie && ties_here <= cut.count)) out[larger_here + min(ties_here, cut.count) - 1] = i;
    larger += all >> 16;
    ties += all & 0xFFFF;
  }
}

}  // namespace

void segmented_top_k_kernel(const SegmentedTopKParams& p, Stream stream) {
  launch("segmented_top_k", select_scores_kernel, dim3(static_cast<unsigned>(p.num_segments)), dim3(kThreads), 0,
         stream, p);
}

}  // namespace dpn::cuda
