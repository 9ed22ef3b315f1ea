// The choice of the next token where the logits are: without a round trip through the host.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

struct SampleGreedyParams {
  std::int32_t* tokens;     // [num_rows]
  std::int32_t* is_finite;  // [num_rows]
  const void* logits;       // [num_rows, vocab_size], row stride logits_stride
  std::int64_t num_rows;
  std::int64_t vocab_size;
  std::int64_t logits_stride;
  DType dtype;
};

struct SampleParams {
  SampleGreedyParams greedy;
  std::int32_t* depths;           // scratch [num_rows, vocab_size], see sample_row.h
  std::uint64_t* masses;          // scratch [num_rows, vocab_size]; for the CPU only
  const float* temperatures;      // [num_rows], 0: greedy
  const std::int32_t* top_k;      // [num_rows], 0 or -1: off
  const double* top_p;            // [num_rows], 1: off
  const float* min_p;             // [num_rows], 0: off
  const std::int64_t* keys;       // [num_rows] of the rows' random numbers, the bits of an unsigned number
  const std::int64_t* positions;  // [num_rows] which random number of the row
};

// tokens: the first of the largest logits of each row; a NaN is never larger, so the token stays one of the vocabulary.
// is_finite: 1 where the row has a softmax (no NaN, a largest logit that is finite), else 0.
void sample_greedy(const Tensor& tokens, const Tensor& is_finite, const Tensor& logits, Stream stream);

// One random token per row, as dpn_rt/sampling/filters.py draws it; rows without a softmax get what sample_greedy
// gives.
void sample(const Tensor& tokens, const Tensor& is_finite, const Tensor& logits, const Tensor& depths,
            const Tensor& temperatures, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
            const Tensor& keys, const Tensor& positions, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(sample_greedy_kernel, SampleGreedyParams)
DPN_DECLARE_CUDA_KERNEL(sample_greedy_kernel, SampleGreedyParams)
DPN_DECLARE_CPU_KERNEL(sample_kernel, SampleParams)
DPN_DECLARE_CUDA_KERNEL(sample_kernel, SampleParams)
