#include "ops/reduction/route.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/check.h"
#include "ops/linear/linear.h"

namespace dpn {

namespace {

void run(const RouteParams& params, const Tensor& hidden, Stream stream) {
  DPN_CALL_KERNEL(route_kernel, params, hidden, stream)
}

void check_router(const Checker& check, const Tensor& predictor, const OptionalTensor& norm_weight,
                  const OptionalTensor& norm_bias, const OptionalTensor& hidden_weight, Dim& hidden_size,
                  Dim& router_size, Dim& num_experts) {
  check.condition(!norm_weight == !hidden_weight && !norm_bias == !hidden_weight,
                  "norm_weight, norm_bias and hidden_weight must be given together");
  if (hidden_weight) {
    check.contiguous("norm_weight", *norm_weight, {&hidden_size}, {DType::f32})
        .contiguous("norm_bias", *norm_bias, {&hidden_size}, {DType::f32})
        .contiguous("hidden_weight", *hidden_weight, {&router_size, &hidden_size}, {DType::f32});
  } else {
    router_size.value = hidden_size;
    router_size.bound_by = "hidden";
  }
  check.contiguous("predictor", predictor, {&num_experts, &router_size}, {DType::f32});
  check.condition(num_experts > 0, "predictor has num_experts=0, expected at least 1")
      .condition(hidden_size > 0, "hidden has hidden_size=0, expected at least 1");
}

// Checks that biases are finite: otherwise the logit of an expert of level 0 would be NaN.
void check_biases(const Checker& check, const OptionalTensor& biases, const OptionalTensor& levels, Dim& num_seqs,
                  Dim& num_experts) {
  check.condition(!biases == !levels, "biases and levels must be given together");
  if (!biases) return;
  check.contiguous("biases", *biases, {&num_seqs}, {DType::f32})
      .contiguous("levels", *levels, {&num_experts}, {DType::i32});
  for (std::int64_t b = 0; check.can_read() && b < num_seqs; ++b) {
    const float bias = biases->as<float>()[b];
    check.condition(std::isfinite(bias), "biases has the entry " + std::to_string(bias) + " at flat index " +
                                             std::to_string(b) + ", expected a finite number");
  }
}

// Sizes of the parts of the GPU's scratch memory, which is one workspace of 4-byte elements.
struct Workspace {
  std::int64_t features, activations, logits, finished;

  std::int64_t size() const { return features + activations + logits + finished; }
};

Workspace workspace_of(std::int64_t num_seqs, std::int64_t hidden_size, std::int64_t router_size,
                       std::int64_t num_experts) {
  const std::int64_t groups = num_router_groups(router_size);
  return {.features = num_seqs * hidden_size,
          .activations = num_router_splits(hidden_size) * num_seqs * groups * kRouterUnits,
          .logits = groups * num_seqs * num_experts,
          .finished = 1 + groups};
}

void set_workspace(const Checker& check, RouteParams& params, const OptionalTensor& workspace) {
  check.condition(workspace.has_value(), "workspace is None, expected route_workspace_size elements");
  const Workspace sizes = workspace_of(params.num_seqs, params.hidden_size, params.router_size, params.num_experts);
  Dim size("workspace_size");
  check.contiguous("workspace", *workspace, {&size}, {DType::f32})
      .range("workspace_size", size, sizes.size(), INT64_MAX);
  params.features = workspace->as<float>();
  params.activations = params.features + sizes.features;
  params.logits = params.activations + sizes.activations;
  params.finished = reinterpret_cast<std::uint32_t*>(params.logits + sizes.logits);
}

}  // namespace

std::int64_t route_workspace_size(const Tensor& hidden, const Tensor& cu_router_rows, const Tensor& predictor) {
  // route itself refuses other ranks.
  if (hidden.device != Device::cuda || hidden.ndim != 2 || cu_router_rows.ndim != 1 || predictor.ndim != 2) return 0;
  return workspace_of(cu_router_rows.shape[0] - 1, hidden.shape[1], predictor.shape[1], predictor.shape[0]).size();
}

void route(const Tensor& probs, const Tensor& experts, const Tensor& hidden, const Tensor& router_rows,
           const Tensor& cu_router_rows, const Tensor& predictor, const OptionalTensor& norm_weight,
           const OptionalTensor& norm_bias, const OptionalTensor& hidden_weight, float eps,
           const OptionalTensor& biases, const OptionalTensor& levels, const OptionalTensor& workspace, Stream stream) {
  const Checker check("route", hidden);
  Dim num_tokens("num_tokens"), hidden_size("hidden_size"), router_size("router_size"), num_experts("num_experts");
  Dim num_rows("num_router_rows"), num_offsets("num_seqs + 1"), num_seqs("num_seqs");
  check.tensor("hidden", hidden, {&num_tokens, &hidden_size}, check.floats());
  check_router(check, predictor, norm_weight, norm_bias, hidden_weight, hidden_size, router_size, num_experts);
  check.contiguous("router_rows", router_rows, {&num_rows}, {DType::i32})
      .contiguous("cu_router_rows", cu_router_rows, {&num_offsets}, {DType::i32});
  check.condition(num_offsets > 0, "cu_router_rows is empty, expected num_seqs + 1 entries");
  check.condition(eps >= 0, "eps is " + std::to_string(eps) + ", expected at least 0");
  num_seqs.value = num_offsets - 1;
  const auto* offsets = cu_router_rows.as<std::int32_t>();
  if (check.can_read()) {
    check_offsets(check, "cu_router_rows", offsets, num_seqs, num_rows, "num_router_rows");
    check_entries(check, "router_rows", router_rows.as<std::int32_t>(), num_rows, 0, num_tokens - 1);
  }
  check.contiguous("probs", probs, {&num_seqs, &num_experts}, {DType::f32})
      .contiguous("experts", experts, {&num_seqs}, {DType::i32});
  check_biases(check, biases, levels, num_seqs, num_experts);

  RouteParams params{.probs = probs.as<float>(),
                     .experts = experts.as<std::int32_t>(),
                     .hidden = hidden.data,
                     .router_rows = router_rows.as<std::int32_t>(),
                     .cu_router_rows = offsets,
                     .routed_seqs = nullptr,
                     .norm_weight = as_or_null<float>(norm_weight),
                     .norm_bias = as_or_null<float>(norm_bias),
                     .hidden_weight = as_or_null<float>(hidden_weight),
                     .predictor = predictor.as<float>(),
                     .biases = as_or_null<float>(biases),
                     .levels = as_or_null<std::int32_t>(levels),
                     .features = nullptr,
                     .activations = nullptr,
                     .logits = nullptr,
                     .packed_x = nullptr,
                     .finished = nullptr,
                     .num_seqs = num_seqs,
                     .num_routed = num_seqs,
                     .num_experts = num_experts,
                     .hidden_size = hidden_size,
                     .router_size = router_size,
                     .hidden_stride = hidden.strides[0],
                     .eps = eps,
                     .dtype = hidden.dtype};
  if (!check.can_read()) {
    set_workspace(check, params, workspace);
    return run(params, hidden, stream);
  }
  std::vector<std::int32_t> routed;
  for (std::int32_t b = 0; b < num_seqs; ++b) {
    if (offsets[b + 1] > offsets[b]) routed.push_back(b);
  }
  std::fill_n(probs.as<float>(), probs.numel(), 0.0f);
  std::fill_n(experts.as<std::int32_t>(), experts.numel(), -1);
  if (routed.empty()) return;

  const auto count = static_cast<std::int64_t>(routed.size());
  const AlignedBuffer features(count * hidden_size * 4), activations(count * router_size * 4),
      logits(count * num_experts * 4);
  const AlignedBuffer packed_x(linear_scratch_bytes(count, std::max<std::int64_t>(hidden_size, router_size)));
  params.routed_seqs = routed.data();
  params.num_routed = count;
  params.features = static_cast<float*>(features.data());
  params.activations = static_cast<float*>(activations.data());
  params.logits = static_cast<float*>(logits.data());
  params.packed_x = packed_x.data();
  run(params, hidden, stream);
}

}  // namespace dpn
