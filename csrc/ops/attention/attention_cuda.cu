#include <string>
#include <utility>

#include "core/check.h"
#include "ops/attention/attention_cuda.h"

namespace dpn::cuda {

namespace {

// Calls `function` with head_dim as a constant; there is one for each head_dim that is built.
template <class Function, int... kHeadDims>
void dispatch_head_dim(const char* op, std::int64_t head_dim, const Function& function,
                       std::integer_sequence<int, kHeadDims...>) {
  const auto call = [&](auto built) { return head_dim == built && (function(built), true); };
  if ((call(std::integral_constant<int, kHeadDims>{}) || ...)) return;
  std::string names;
  ((names += (names.empty() ? "" : ", ") + std::to_string(kHeadDims)), ...);
  Checker(op).fail("head_dim is " + std::to_string(head_dim) + ", expected one of " + names + " on cuda");
}

}  // namespace

void attention_kernel(const AttentionParams& params, Stream stream) {
  dispatch_head_dim(
      params.k ? "attention" : "attention_extend", params.head_dim,
      [&](auto head_dim) { run_attention<head_dim>(params, stream); }, BuiltHeadDims{});
}

void attention_decode_kernel(const AttentionDecodeParams& params, Stream stream) {
  dispatch_head_dim(
      "attention_decode", params.head_dim, [&](auto head_dim) { run_attention_decode<head_dim>(params, stream); },
      BuiltHeadDims{});
}

}  // namespace dpn::cuda
