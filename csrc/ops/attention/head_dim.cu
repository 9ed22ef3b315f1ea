// Attention for one head size, DPN_HEAD_DIM. The build compiles this file once for each one in DPN_CUDA_HEAD_DIMS.
#include "ops/attention/decode_cuda.cuh"
#include "ops/attention/prefill_cuda.cuh"

namespace dpn::cuda {

template void run_attention<DPN_HEAD_DIM>(const AttentionParams&, Stream);
template void run_attention_decode<DPN_HEAD_DIM>(const AttentionDecodeParams&, Stream);

}  // namespace dpn::cuda
