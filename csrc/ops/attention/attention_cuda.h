// Attention on the GPU. Each head_dim has a translation unit of its own (head_dim.cu), since these templates take most
// of the build time.
#pragma once

#include <utility>

#include "ops/attention/attention.h"

namespace dpn::cuda {

// The head sizes that are built: DPN_RT_HEAD_DIMS of cmake/cuda_kernels.cmake.
using BuiltHeadDims = std::integer_sequence<int, DPN_CUDA_HEAD_DIMS>;

template <int kHeadDim>
void run_attention(const AttentionParams& params, Stream stream);

template <int kHeadDim>
void run_attention_decode(const AttentionDecodeParams& params, Stream stream);

}  // namespace dpn::cuda
