#include "ops/attention_decode_cuda.cuh"
#include "ops/attention_prefill_cuda.cuh"

namespace dpn::cuda {

template void run_attention<32>(const AttentionParams&, Stream);
template void run_attention_decode<32>(const AttentionDecodeParams&, Stream);

}  // namespace dpn::cuda
