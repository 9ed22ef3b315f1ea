#include <cmath>

#include "core/parallel.h"
#include "ops/activation/activation_simd.h"
#include "ops/linear/linear.h"
#include "ops/reduction/route.h"

namespace dpn::DPN_ISA {

namespace {

// The mean of a sequence's router rows.
template <class T>
void mean_row(const RouteParams& p, std::int32_t sequence, float* mean) {
  const std::int32_t begin = p.cu_router_rows[sequence], end = p.cu_router_rows[sequence + 1];
  const auto count = static_cast<float>(end - begin);
  for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
    VecF sum{};
    for (std::int32_t row = begin; row < end; ++row) {
      sum += load_n(static_cast<const T*>(p.hidden) + p.router_rows[row] * p.hidden_stride + i, n);
    }
    store_n(mean + i, sum / count, n);
  });
}

void layer_norm_row(const RouteParams& p, float* x) {
  const auto size = static_cast<float>(p.hidden_size);
  VecF sum{};
  for_each_vector(p.hidden_size, [&](std::int64_t i, int n) { sum += load_n(x + i, n); });
  const float mean = reduce_sum(sum) / size;
  VecF squares{};
  for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
    const VecF centred = load_n(x + i, n) - first_lanes(mean, n);
    squares += centred * centred;
  });
  const float scale = 1.0f / std::sqrt(reduce_sum(squares) / size + p.eps);
  for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
    store_n(x + i, (load_n(x + i, n) - mean) * scale * load_n(p.norm_weight + i, n) + load_n(p.norm_bias + i, n), n);
  });
}

void multiply(const RouteParams& p, float* out, const float* x, const float* weight, std::int64_t in_features,
              std::int64_t out_features) {
  linear_kernel({.out = out,
                 .x = x,
                 .weight = weight,
                 .bias = nullptr,
                 .packed_x = p.packed_x,
                 .num_tokens = p.num_routed,
                 .in_features = in_features,
                 .out_features = out_features,
                 .x_stride = in_features,
                 .dtype = DType::f32});
}

// Adds the sequence's bias, computes softmax(logits / 10), and chooses the largest logit, of equal ones the first. A
// NaN never counts as larger, so the choice is always a valid expert.
void choose(const RouteParams& p, std::int64_t index) {
  constexpr float kTemperature = 10.0f;
  float* logits = p.logits + index * p.num_experts;
  const std::int32_t sequence = p.routed_seqs[index];
  for (std::int64_t e = 0; p.biases && e < p.num_experts; ++e) {
    logits[e] += p.biases[sequence] * static_cast<float>(p.levels[e]);
  }
  float* probs = p.probs + sequence * p.num_experts;
  std::int32_t best = 0;
  for (std::int32_t e = 1; e < p.num_experts; ++e) {
    if (logits[e] > logits[best]) best = e;
  }
  float sum = 0;
  for (std::int64_t e = 0; e < p.num_experts; ++e) {
    probs[e] = exp(broadcast((logits[e] - logits[best]) / kTemperature))[0];
    sum += probs[e];
  }
  for (std::int64_t e = 0; e < p.num_experts; ++e) probs[e] /= sum;
  p.experts[sequence] = best;
}

template <class T>
void run(const RouteParams& p) {
  const std::int64_t row_bytes = 4 * p.hidden_size * static_cast<std::int64_t>(sizeof(float));
  parallel_rows(p.num_routed, row_bytes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      mean_row<T>(p, p.routed_seqs[i], p.features + i * p.hidden_size);
      if (p.hidden_weight) layer_norm_row(p, p.features + i * p.hidden_size);
    }
  });
  const float* predictor_input = p.features;
  if (p.hidden_weight) {
    multiply(p, p.activations, p.features, p.hidden_weight, p.hidden_size, p.router_size);
    for_each_vector(p.num_routed * p.router_size,
                    [&](std::int64_t i, int n) { store_n(p.activations + i, gelu(load_n(p.activations + i, n)), n); });
    predictor_input = p.activations;
  }
  multiply(p, p.logits, predictor_input, p.predictor, p.router_size, p.num_experts);
  for (std::int64_t i = 0; i < p.num_routed; ++i) choose(p, i);
}

}  // namespace

void route_kernel(const RouteParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
