// The router of a boundary: router rows -> probabilities of the pooling experts and the chosen expert, in float32.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/host_device.h"
#include "core/tensor.h"

namespace dpn {

// Size of a block of the hidden layer on the GPU: units of a group, and columns of a split.
constexpr int kRouterUnits = 32;
constexpr int kRouterColumns = 1024;

DPN_HOST_DEVICE constexpr std::int64_t num_router_groups(std::int64_t router_size) {
  return (router_size + kRouterUnits - 1) / kRouterUnits;
}

DPN_HOST_DEVICE constexpr std::int64_t num_router_splits(std::int64_t hidden_size) {
  return (hidden_size + kRouterColumns - 1) / kRouterColumns;
}

struct RouteParams {
  float* probs;                        // [num_seqs, num_experts]
  std::int32_t* experts;               // [num_seqs]
  const void* hidden;                  // [num_tokens, hidden_size], row stride hidden_stride
  const std::int32_t* router_rows;     // [num_router_rows]
  const std::int32_t* cu_router_rows;  // [num_seqs + 1]
  const std::int32_t* routed_seqs;     // [num_routed]: the sequences that have router rows; for the CPU only
  const float* norm_weight;            // [hidden_size]; null for a router without LayerNorm and hidden layer
  const float* norm_bias;              // [hidden_size]
  const float* hidden_weight;          // [router_size, hidden_size]
  const float* predictor;              // [num_experts, router_size]; router_size = hidden_size without hidden layer
  const float* biases;                 // [num_seqs] added to each logit times its level; null: none
  const std::int32_t* levels;          // [num_experts] level of compression; null without biases
  float* features;                     // scratch [num_routed, hidden_size], num_routed = num_seqs on the GPU
  float* activations;                  // scratch [num_routed, router_size]; on the GPU sums of the splits,
                                       // [num_splits, num_seqs, num_groups * kRouterUnits]
  float* logits;                       // scratch [num_routed, num_experts]; on the GPU [num_groups, num_seqs,
                                       // num_experts]
  void* packed_x;                      // scratch of the products, see LinearParams; for the CPU only
  std::uint32_t* finished;             // scratch [1 + num_groups], groups and blocks of each; for the GPU only
  std::int64_t num_seqs;
  std::int64_t num_routed;
  std::int64_t num_experts;
  std::int64_t hidden_size;
  std::int64_t router_size;
  std::int64_t hidden_stride;
  float eps;
  DType dtype;  // of hidden
};

// norm_weight, norm_bias and hidden_weight are all given or all null; so are biases and levels. workspace is used on
// the GPU only.
void route(const Tensor& probs, const Tensor& experts, const Tensor& hidden, const Tensor& router_rows,
           const Tensor& cu_router_rows, const Tensor& predictor, const OptionalTensor& norm_weight,
           const OptionalTensor& norm_bias, const OptionalTensor& hidden_weight, float eps,
           const OptionalTensor& biases, const OptionalTensor& levels, const OptionalTensor& workspace, Stream stream);
// Number of elements of the float32 workspace that route needs for tensors of these shapes; 0 on the CPU.
std::int64_t route_workspace_size(const Tensor& hidden, const Tensor& cu_router_rows, const Tensor& predictor);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(route_kernel, RouteParams)
DPN_DECLARE_CUDA_KERNEL(route_kernel, RouteParams)
