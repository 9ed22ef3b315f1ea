// The ops for ctypes: each returns null, or the message of what it threw.
#include <exception>
#include <string>

#include "ops/activation.h"
#include "ops/norm.h"
#include "ops/pool.h"
#include "ops/rope.h"

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

}  // namespace

extern "C" {

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

const char* rope_store(const Tensor* qkv, const Tensor* positions, const Tensor* cos_sin, const Tensor* kv_cache,
                       std::int64_t layer_in_cell, const Tensor* block_table, const Tensor* cu_seqlens,
                       std::int64_t num_heads, std::int64_t num_kv_heads) {
  return caught([&] {
    dpn::rope_store(*qkv, *positions, *cos_sin, *kv_cache, layer_in_cell, *block_table, *cu_seqlens, num_heads,
                    num_kv_heads, 0);
  });
}

// conv_weights: [num_conv_weights], or null.
const char* pool(const Tensor* out, const Tensor* x, const Tensor* cu_seqlens, const Tensor* image_start,
                 const Tensor* grids, const Tensor* experts, const Tensor* kernels, const Tensor* out_cu_seqlens,
                 const Tensor* scales, const char* function, const Tensor* conv_weights,
                 std::int64_t num_conv_weights) {
  return caught([&] {
    std::optional<std::vector<Tensor>> weights;
    if (conv_weights) weights.emplace(conv_weights, conv_weights + num_conv_weights);
    dpn::pool(*out, *x, *cu_seqlens, *image_start, *grids, *experts, *kernels, *out_cu_seqlens, scales, function,
              weights, 0);
  });
}

}  // extern "C"
