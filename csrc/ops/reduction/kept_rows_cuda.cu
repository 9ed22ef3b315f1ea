#include "core/cuda_launch.cuh"
#include "core/cuda_sequences.cuh"
#include "core/cuda_vector.cuh"
#include "ops/reduction/kept_row.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

// A thread writes one row.
__global__ void __launch_bounds__(kThreads) find_rows_kernel(const __grid_constant__ KeptRowsParams p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.num_out_tokens) return;
  const int num_seqs = static_cast<int>(p.num_seqs);
  std::int64_t source = 0;  // for rows after the last one: the buffer may be longer
  if (row < p.out_cu_seqlens[num_seqs]) {
    const int b = sequence_of_row(p.out_cu_seqlens, num_seqs, static_cast<int>(row));
    source = p.cu_seqlens[b] + kept_row(p, b, static_cast<int>(row) - p.out_cu_seqlens[b]);
  }
  p.out[row] = source;
}

}  // namespace

void kept_rows_kernel(const KeptRowsParams& p, Stream stream) {
  launch("kept_rows", find_rows_kernel, dim3(static_cast<unsigned>(ceil_div(p.num_out_tokens, kThreads))),
         dim3(kThreads), 0, stream, p);
}

}  // namespace dpn::cuda
