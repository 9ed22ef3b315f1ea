// Sums and maxima over the lanes of a warp and over a block. Every thread gets the same, and so does every run.
#pragma once

#include <cuda_runtime.h>

namespace dpn::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// partial: [kWarpSize] floats of shared memory that nothing else uses until the next barrier.
// num_warps: number of warps in the block; need not be a power of two.
__device__ inline float block_sum(float value, float* partial, int num_warps) {
  value = warp_sum(value);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_sum(lane < num_warps ? partial[lane] : 0.0f);
}

// The largest of integers that are not negative. partial, num_warps: as of block_sum.
__device__ inline int block_max(int value, int* partial, int num_warps) {
  value = __reduce_max_sync(kAllLanes, value);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < num_warps ? partial[lane] : 0);
}

}  // namespace dpn::cuda
