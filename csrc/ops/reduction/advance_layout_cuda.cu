#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_sequences.cuh"
#include "core/cuda_vector.cuh"
#include "ops/reduction/advance_sequence.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

// Runs in one warp, since a batch has few sequences.
__global__ void __launch_bounds__(kWarpSize) advance_sequences_kernel(const __grid_constant__ AdvanceLayoutParams p) {
  const int lane = static_cast<int>(threadIdx.x), num_seqs = static_cast<int>(p.num_seqs);
  int total = 0;  // rows of all earlier sequences
  if (lane == 0) p.out_cu_seqlens[0] = 0;
  for (int first = 0; first < num_seqs; first += kWarpSize) {
    int end = first + lane < num_seqs ? advance_sequence(p, first + lane) : 0;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    end += total;
    if (first + lane < num_seqs) p.out_cu_seqlens[first + lane + 1] = end;
    total = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
  __syncwarp();  // other lanes read the offsets
  for (int i = lane; i < p.num_router_rows; i += kWarpSize) {
    const int b = sequence_of_row(p.cu_router_rows, num_seqs, i);
    p.out_router_rows[i] = advance_router_row(p, b, i);
  }
}

__global__ void __launch_bounds__(kThreads) place_rows_kernel(const __grid_constant__ AdvanceLayoutParams p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.max_tokens) return;
  const int num_seqs = static_cast<int>(p.num_seqs);
  int position = 0, cache_row = 0;
  if (row < p.out_cu_seqlens[num_seqs]) {
    const int b = sequence_of_row(p.out_cu_seqlens, num_seqs, static_cast<int>(row));
    const int in_sequence = static_cast<int>(row) - p.out_cu_seqlens[b];
    position = p.first_positions[b] + in_sequence;
    cache_row = p.first_cache_rows[b] + in_sequence;
  }
  p.positions[row] = position;
  p.cache_rows[row] = cache_row;
}

}  // namespace

void advance_layout_kernel(const AdvanceLayoutParams& p, Stream stream) {
  launch("advance_layout", advance_sequences_kernel, dim3(1), dim3(kWarpSize), 0, stream, p);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.max_tokens, kThreads)));
  launch("advance_layout", place_rows_kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace dpn::cuda
