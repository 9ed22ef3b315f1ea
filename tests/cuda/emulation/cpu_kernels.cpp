// What the ops link for the CPU: never called here, since every tensor says that it is on a GPU.
#include <stdexcept>

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/parallel.h"
#include "ops/activation/activation.h"
#include "ops/attention/attention.h"
#include "ops/norm/norm.h"
#include "ops/quantized/dequantize.h"
#include "ops/quantized/quantize.h"
#include "ops/reduction/advance_layout.h"
#include "ops/reduction/kept_rows.h"
#include "ops/reduction/last_row_scores.h"
#include "ops/reduction/pool.h"
#include "ops/reduction/route.h"
#include "ops/reduction/segmented_top_k.h"
#include "ops/rope/rope.h"
#include "ops/sampling/sample.h"

namespace dpn {

CpuIsa cpu_isa() { throw std::logic_error("a CPU tensor in the emulation of the GPU"); }
CpuIsa cpu_isa(TunedOp) { return cpu_isa(); }
int max_threads() { return 1; }
std::int64_t tasks_for_rows(std::int64_t, std::int64_t) { return 1; }

namespace portable {
void activation_kernel(const ActivationParams&) {}
void advance_layout_kernel(const AdvanceLayoutParams&) {}
void attention_kernel(const AttentionParams&) {}
void attention_decode_kernel(const AttentionDecodeParams&) {}
void dequantize_kernel(const DequantizeParams&) {}
void kept_rows_kernel(const KeptRowsParams&) {}
void last_row_scores_kernel(const LastRowScoresParams&) {}
void layer_norm_kernel(const NormParams&) {}
void pool_kernel(const PoolParams&) {}
void quantize_kernel(const QuantizeParams&) {}
void rms_norm_kernel(const NormParams&) {}
void rope_store_kernel(const RopeStoreParams&) {}
void route_kernel(const RouteParams&) {}
void sample_greedy_kernel(const SampleGreedyParams&) {}
void sample_kernel(const SampleParams&) {}
void segmented_top_k_kernel(const SegmentedTopKParams&) {}
}  // namespace portable

namespace cuda {
DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() {}
int num_multiprocessors() { return 4; }
}  // namespace cuda
}  // namespace dpn
