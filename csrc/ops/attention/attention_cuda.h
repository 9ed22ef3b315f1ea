// Attention on the GPU. Each head_dim has a translation unit of its own, since these templates take most of the build
// time.
#pragma once

#include "ops/attention/attention.h"

namespace dpn::cuda {

template <int kHeadDim>
void run_attention(const AttentionParams& params, Stream stream);

template <int kHeadDim>
void run_attention_decode(const AttentionDecodeParams& params, Stream stream);

}  // namespace dpn::cuda
