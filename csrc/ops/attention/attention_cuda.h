// Attention on the GPU, one translation unit for each head_dim: the templates are what the build takes longest for.
#pragma once

#include "ops/attention/attention.h"

namespace dpn::cuda {

template <int kHeadDim>
void run_attention(const AttentionParams& params, Stream stream);

template <int kHeadDim>
void run_attention_decode(const AttentionDecodeParams& params, Stream stream);

}  // namespace dpn::cuda
