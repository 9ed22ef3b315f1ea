#include "core/check.h"
#include "ops/attention/attention_cuda.h"

namespace dpn::cuda {

namespace {

// Calls `function` with head_dim as a constant; there is one for each head_dim that is built.
template <class Function>
void dispatch_head_dim(const char* op, std::int64_t head_dim, const Function& function) {
  switch (head_dim) {
    case 16:
      return function(std::integral_constant<int, 16>{});
    case 32:
      return function(std::integral_constant<int, 32>{});
    case 64:
      return function(std::integral_constant<int, 64>{});
    case 96:
      return function(std::integral_constant<int, 96>{});
    case 128:
      return function(std::integral_constant<int, 128>{});
    default:
      Checker(op).fail("head_dim is " + std::to_string(head_dim) + ", expected 16, 32, 64, 96 or 128 on cuda");
  }
}

}  // namespace

void attention_kernel(const AttentionParams& params, Stream stream) {
  dispatch_head_dim(params.k ? "attention" : "attention_extend", params.head_dim,
                    [&](auto head_dim) { run_attention<head_dim>(params, stream); });
}

void attention_decode_kernel(const AttentionDecodeParams& params, Stream stream) {
  dispatch_head_dim("attention_decode", params.head_dim,
                    [&](auto head_dim) { run_attention_decode<head_dim>(params, stream); });
}

}  // namespace dpn::cuda
