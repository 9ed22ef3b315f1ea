#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_sequences.cuh"
#include "core/cuda_vector.cuh"
#include "ops/advance_layout.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

// Expert of sequence b, -1 where it is skipped.
__device__ int choose(const AdvanceLayoutParams& p, int b) {
  if (p.grids[2 * b] * p.grids[2 * b + 1] < p.min_visual_tokens) return -1;
  const int forced = p.forced ? p.forced[b] : -1;
  const int chosen = forced >= 0 ? forced : p.routed ? p.routed[b] : 0;
  return max(chosen, 0);
}

// Fills everything of sequence b that does not depend on the others; returns its rows in the next stage.
__device__ int advance_sequence(const AdvanceLayoutParams& p, int b) {
  const int height = p.grids[2 * b], width = p.grids[2 * b + 1], length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  const int chosen = choose(p, b);
  int out_height = height, out_width = width, expert = -1;
  if (chosen >= 0) {
    const int kernel_height = p.kernels[2 * chosen], kernel_width = p.kernels[2 * chosen + 1];
    if (kernel_height <= height && kernel_width <= width) {
      out_height = height / kernel_height;
      out_width = width / kernel_width;
      expert = chosen;
    }
  }
  p.chosen[b] = chosen;
  p.experts[b] = expert;
  p.scales[b] = p.probs ? p.probs[b * p.num_experts + max(chosen, 0)] : 1.0f;
  p.out_grids[2 * b] = out_height;
  p.out_grids[2 * b + 1] = out_width;
  return length - height * width + out_height * out_width;
}

// One warp: a batch has few sequences.
__global__ void __launch_bounds__(kWarpSize) advance_sequences_kernel(const __grid_constant__ AdvanceLayoutParams p) {
  const int lane = static_cast<int>(threadIdx.x), num_seqs = static_cast<int>(p.num_seqs);
  int total = 0;  // rows of the sequences before
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
  __syncwarp();  // the offsets are read by other lanes
  for (int i = lane; i < p.num_router_rows; i += kWarpSize) {
    const int b = sequence_of_row(p.cu_router_rows, num_seqs, i);
    const int row = p.router_rows[i] - p.cu_seqlens[b];
    const int shrink = p.cu_seqlens[b + 1] - p.cu_seqlens[b] - (p.out_cu_seqlens[b + 1] - p.out_cu_seqlens[b]);
    p.out_router_rows[i] = p.out_cu_seqlens[b] + row - (row > p.image_start[b] ? shrink : 0);
  }
}

__global__ void __launch_bounds__(kThreads) positions_kernel(const __grid_constant__ AdvanceLayoutParams p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.max_tokens) return;
  const int num_seqs = static_cast<int>(p.num_seqs);
  int position = 0;
  if (row < p.out_cu_seqlens[num_seqs]) {
    const int b = sequence_of_row(p.out_cu_seqlens, num_seqs, static_cast<int>(row));
    position = static_cast<int>(row) - p.out_cu_seqlens[b] + p.first_rows[b];
  }
  p.positions[row] = position;
}

}  // namespace

void advance_layout_kernel(const AdvanceLayoutParams& p, Stream stream) {
  launch("advance_layout", advance_sequences_kernel, dim3(1), dim3(kWarpSize), 0, stream, p);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.max_tokens, kThreads)));
  launch("advance_layout", positions_kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace dpn::cuda
