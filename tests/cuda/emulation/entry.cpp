// The ops for ctypes: each returns null, or the message of what it threw.
#include <exception>
#include <string>

#include "global_memory.h"
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

namespace {

using dpn::Tensor;

template <class Function>
const char* caught(const Function& function) {
  static std::string message;
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Null: the argument is left out.
dpn::OptionalTensor optional(const Tensor* t) { return t ? dpn::OptionalTensor(*t) : std::nullopt; }

}  // namespace

extern "C" {

// The tensors of the next calls, see GlobalMemory.
void set_tensors(unsigned char* const* begins, const std::int64_t* sizes, std::int64_t count) {
  dpn::emulation::global_memory().set_tensors(begins, sizes, count);
}

const char* rms_norm(const Tensor* out, const Tensor* x, const Tensor* weight, float eps) {
  return caught([&] { dpn::rms_norm(*out, *x, *weight, eps, 0); });
}

const char* add_rms_norm(const Tensor* out, const Tensor* x, const Tensor* residual, const Tensor* weight, float eps) {
  return caught([&] { dpn::add_rms_norm(*out, *x, *residual, *weight, eps, 0); });
}

const char* layer_norm(const Tensor* out, const Tensor* x, const Tensor* weight, const Tensor* bias, float eps) {
  return caught([&] { dpn::layer_norm(*out, *x, *weight, *bias, eps, 0); });
}

const char* add_layer_norm(const Tensor* out, const Tensor* x, const Tensor* residual, const Tensor* weight,
                           const Tensor* bias, float eps) {
  return caught([&] { dpn::add_layer_norm(*out, *x, *residual, *weight, *bias, eps, 0); });
}

const char* silu_mul(const Tensor* out, const Tensor* gate_up) {
  return caught([&] { dpn::silu_mul(*out, *gate_up, 0); });
}

const char* activation(const Tensor* out, const Tensor* x, const char* kind) {
  return caught([&] { dpn::activation(*out, *x, kind, 0); });
}

const char* quantize(const Tensor* out, const Tensor* scale, const Tensor* x) {
  return caught([&] { dpn::quantize(*out, *scale, *x, 0); });
}

// kind: null: the argument is left out.
const char* dequantize(const Tensor* out, const Tensor* sums, const Tensor* row_scale, const Tensor* scale,
                       const Tensor* bias, const char* kind) {
  return caught([&] {
    dpn::dequantize(*out, *sums, *row_scale, *scale, optional(bias),
                    kind ? std::optional<std::string>(kind) : std::nullopt, 0);
  });
}

const char* rope_store(const Tensor* qkv, const Tensor* positions, const Tensor* cache_rows, const Tensor* cos_sin,
                       const Tensor* kv_cache, std::int64_t layer_in_block, const Tensor* block_table,
                       const Tensor* cu_seqlens, std::int64_t num_heads, std::int64_t num_kv_heads,
                       const Tensor* q_norm, const Tensor* k_norm, float eps) {
  return caught([&] {
    dpn::rope_store(*qkv, *positions, *cache_rows, *cos_sin, *kv_cache, layer_in_block, *block_table, *cu_seqlens,
                    num_heads, num_kv_heads, optional(q_norm), optional(k_norm), eps, 0);
  });
}

// conv_weights: [num_conv_weights], or null.
const char* pool(const Tensor* out, const Tensor* x, const Tensor* cu_seqlens, const Tensor* cu_images,
                 const Tensor* image_starts, const Tensor* grids, const Tensor* experts, const Tensor* kernels,
                 const Tensor* out_cu_seqlens, const Tensor* scales, const char* function, const Tensor* conv_weights,
                 std::int64_t num_conv_weights) {
  return caught([&] {
    std::optional<std::vector<Tensor>> weights;
    if (conv_weights) weights.emplace(conv_weights, conv_weights + num_conv_weights);
    dpn::pool(*out, *x, *cu_seqlens, *cu_images, *image_starts, *grids, *experts, *kernels, *out_cu_seqlens,
              optional(scales), function, weights, 0);
  });
}

const char* attention(const Tensor* out, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* cu_seqlens,
                      const Tensor* first_keys, bool causal, float scale) {
  return caught([&] { dpn::attention(*out, *q, *k, *v, *cu_seqlens, optional(first_keys), causal, scale, 0); });
}

const char* attention_extend(const Tensor* out, const Tensor* q, const Tensor* kv_cache, std::int64_t layer_in_block,
                             const Tensor* block_table, const Tensor* cu_seqlens, const Tensor* context_lens,
                             const Tensor* first_keys, float scale) {
  return caught([&] {
    dpn::attention_extend(*out, *q, *kv_cache, layer_in_block, *block_table, *cu_seqlens, *context_lens,
                          optional(first_keys), scale, 0);
  });
}

const char* attention_decode(const Tensor* out, const Tensor* q, const Tensor* kv_cache, std::int64_t layer_in_block,
                             const Tensor* block_table, const Tensor* context_lens, const Tensor* first_keys,
                             float scale, const Tensor* workspace) {
  return caught([&] {
    dpn::attention_decode(*out, *q, *kv_cache, layer_in_block, *block_table, *context_lens, optional(first_keys), scale,
                          optional(workspace), 0);
  });
}

std::int64_t divide(std::int64_t number, std::int64_t divisor) {
  return dpn::Divisor::of(divisor).divide(static_cast<std::int32_t>(number));
}

std::int64_t attention_decode_workspace_size(const Tensor* q, const Tensor* kv_cache, const Tensor* block_table) {
  return dpn::attention_decode_workspace_size(*q, *kv_cache, *block_table);
}

const char* route(const Tensor* probs, const Tensor* experts, const Tensor* hidden, const Tensor* router_rows,
                  const Tensor* cu_router_rows, const Tensor* predictor, const Tensor* norm_weight,
                  const Tensor* norm_bias, const Tensor* hidden_weight, float eps, const Tensor* biases,
                  const Tensor* levels, const Tensor* workspace) {
  return caught([&] {
    dpn::route(*probs, *experts, *hidden, *router_rows, *cu_router_rows, *predictor, optional(norm_weight),
               optional(norm_bias), optional(hidden_weight), eps, optional(biases), optional(levels),
               optional(workspace), 0);
  });
}

std::int64_t route_workspace_size(const Tensor* hidden, const Tensor* cu_router_rows, const Tensor* predictor) {
  return dpn::route_workspace_size(*hidden, *cu_router_rows, *predictor);
}

const char* advance_layout(const Tensor* chosen, const Tensor* experts, const Tensor* scales,
                           const Tensor* out_cu_seqlens, const Tensor* out_image_starts, const Tensor* out_grids,
                           const Tensor* out_router_rows, const Tensor* positions, const Tensor* cache_rows,
                           const Tensor* routed, const Tensor* probs, const Tensor* forced, const Tensor* kernels,
                           std::int64_t min_visual_tokens, const Tensor* cu_seqlens, const Tensor* first_positions,
                           const Tensor* first_cache_rows, const Tensor* cu_images, const Tensor* image_starts,
                           const Tensor* grids, const Tensor* router_rows, const Tensor* cu_router_rows) {
  return caught([&] {
    dpn::advance_layout(*chosen, *experts, *scales, *out_cu_seqlens, *out_image_starts, *out_grids, *out_router_rows,
                        *positions, *cache_rows, optional(routed), optional(probs), optional(forced), *kernels,
                        min_visual_tokens, *cu_seqlens, *first_positions, *first_cache_rows, *cu_images, *image_starts,
                        *grids, *router_rows, *cu_router_rows, 0);
  });
}

const char* last_row_scores(const Tensor* out, const Tensor* q, const Tensor* k, const Tensor* cu_seqlens,
                            const Tensor* segment_queries, const Tensor* segment_starts, const Tensor* cu_scores,
                            const Tensor* first_keys, float scale, const Tensor* workspace) {
  return caught([&] {
    dpn::last_row_scores(*out, *q, *k, *cu_seqlens, *segment_queries, *segment_starts, *cu_scores, optional(first_keys),
                         scale, optional(workspace), 0);
  });
}

const char* last_row_scores_paged(const Tensor* out, const Tensor* q, const Tensor* blocks, std::int64_t layer_in_block,
                                  const Tensor* block_table, const Tensor* kv_lengths, const Tensor* segment_queries,
                                  const Tensor* segment_starts, const Tensor* cu_scores, const Tensor* first_keys,
                                  float scale, const Tensor* workspace) {
  return caught([&] {
    dpn::last_row_scores_paged(*out, *q, *blocks, layer_in_block, *block_table, *kv_lengths, *segment_queries,
                               *segment_starts, *cu_scores, optional(first_keys), scale, optional(workspace), 0);
  });
}

std::int64_t last_row_scores_workspace_size(const Tensor* q, std::int64_t num_kv_heads, std::int64_t most_keys) {
  return dpn::last_row_scores_workspace_size(*q, num_kv_heads, most_keys);
}

const char* segmented_top_k(const Tensor* out, const Tensor* scores, const Tensor* cu_scores, const Tensor* cu_kept) {
  return caught([&] { dpn::segmented_top_k(*out, *scores, *cu_scores, *cu_kept, 0); });
}

// num_tokens: -1: the argument is left out.
const char* kept_rows(const Tensor* out, const Tensor* cu_seqlens, const Tensor* cu_images, const Tensor* image_starts,
                      const Tensor* image_lengths, const Tensor* kept, const Tensor* cu_kept,
                      const Tensor* out_cu_seqlens, std::int64_t num_tokens) {
  return caught([&] {
    dpn::kept_rows(*out, *cu_seqlens, *cu_images, *image_starts, *image_lengths, *kept, *cu_kept, *out_cu_seqlens,
                   num_tokens < 0 ? std::nullopt : std::optional(num_tokens), 0);
  });
}

const char* sample(const Tensor* tokens, const Tensor* is_finite, const Tensor* logits, const Tensor* depths,
                   const Tensor* temperatures, const Tensor* top_k, const Tensor* top_p, const Tensor* min_p,
                   const Tensor* keys, const Tensor* positions) {
  return caught([&] {
    dpn::sample(*tokens, *is_finite, *logits, *depths, *temperatures, *top_k, *top_p, *min_p, *keys, *positions, 0);
  });
}

const char* sample_greedy(const Tensor* tokens, const Tensor* logits) {
  return caught([&] { dpn::sample_greedy(*tokens, *logits, 0); });
}

}  // extern "C"
