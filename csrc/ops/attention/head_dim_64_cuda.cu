#include "ops/attention/decode_cuda.cuh"
#include "ops/attention/prefill_cuda.cuh"

namespace dpn::cuda {

template void run_attention<64>(const AttentionParams&, Stream);
template void run_attention_decode<64>(const AttentionDecodeParams&, Stream);

}  // namespace dpn::cuda
