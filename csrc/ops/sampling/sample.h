// Chooses the next token on the device that holds the logits, without a round trip through the host.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

struct LogitRows {
  const void* logits;  // [num_rows, vocab_size]
  std::int64_t num_rows;
  std::int64_t vocab_size;
  std::int64_t stride;  // of rows
  DType dtype;
};

struct SampleGreedyParams {
  std::int64_t* tokens;  // [num_rows]
  LogitRows rows;
};

struct SampleParams {
  std::int32_t* tokens;     // [num_rows]
  std::int32_t* is_finite;  // [num_rows]
  LogitRows rows;
  std::int32_t* depths;           // scratch [num_rows, vocab_size], see sample_row.h
  std::uint64_t* masses;          // scratch [num_rows, vocab_size]; for the CPU only
  const float* temperatures;      // [num_rows], 0: greedy
  const std::int32_t* top_k;      // [num_rows], 0 or -1: off
  const double* top_p;            // [num_rows], 1: off
  const float* min_p;             // [num_rows], 0: off
  const std::int64_t* keys;       // [num_rows] keys of the rows' random numbers, the bits of an unsigned number
  const std::int64_t* positions;  // [num_rows] index of the random number in the row's stream
};

// tokens: the largest logit of each row, of equal ones the first; -1 where the row has no softmax, because a logit is
// NaN or the largest one is not finite.
void sample_greedy(const Tensor& tokens, const Tensor& logits, Stream stream);

// One random token per row, as dpn_rt/sampling/filters.py draws it. is_finite: 1 where the row has a softmax. Elsewhere
// it is 0 and the token is the largest logit, of equal ones the first. A NaN never counts as larger, so the token is
// always one of the vocabulary.
void sample(const Tensor& tokens, const Tensor& is_finite, const Tensor& logits, const Tensor& depths,
            const Tensor& temperatures, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
            const Tensor& keys, const Tensor& positions, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(sample_greedy_kernel, SampleGreedyParams)
DPN_DECLARE_CUDA_KERNEL(sample_greedy_kernel, SampleGreedyParams)
DPN_DECLARE_CPU_KERNEL(sample_kernel, SampleParams)
DPN_DECLARE_CUDA_KERNEL(sample_kernel, SampleParams)
