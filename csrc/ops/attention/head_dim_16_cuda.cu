#include "ops/attention/decode_cuda.cuh"
#include "ops/attention/prefill_cuda.cuh"

namespace dpn::cuda {

template void run_attention<16>(const AttentionParams&, Stream);
template void run_attention_decode<16>(const AttentionDecodeParams&, Stream);

}  // namespace dpn::cuda
