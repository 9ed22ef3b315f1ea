// The choice of the next token on the GPU, without a round trip through the host.
#pragma once

#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

struct SampleParams {
  std::int32_t* tokens;     // [num_rows]
  std::int32_t* is_finite;  // [num_rows]
  const void* logits;       // [num_rows, vocab_size], row stride logits_stride
  std::int64_t num_rows;
  std::int64_t vocab_size;
  std::int64_t logits_stride;
  DType dtype;
};

// tokens: the first of the largest logits of each row; a NaN is never larger, so the token stays one of the vocabulary.
// is_finite: 1 where every logit of the row is finite, else 0. On the GPU alone.
void sample_greedy(const Tensor& tokens, const Tensor& is_finite, const Tensor& logits, Stream stream);

}  // namespace dpn

DPN_DECLARE_CUDA_KERNEL(sample_greedy_kernel, SampleParams)
