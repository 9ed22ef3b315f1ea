// What linear_int8 and linear_int4 share: rows of x are quantised to int8, each by itself, and multiplied by weights
// that lie in memory in the order in which dot products of 4 columns read them.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace dpn {

constexpr std::int64_t kPanelRows = 16;  // weight rows that lie together
// Beyond, an int32 could overflow: products are at most 128 * 128.
constexpr std::int64_t kMostInFeatures = 131071;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct QuantizedLinearParams {
  void* out;                   // [num_tokens, out_features]
  const void* x;               // [num_tokens, in_features], row stride x_stride
  const std::uint8_t* weight;  // tiles, see linear_int8.h and linear_int4.h
  const void* scale;           // of the weights, see there
  const void* bias;            // [out_features], or null
  void* scratch;               // quantized_scratch_bytes, aligned to 64 bytes
  std::int64_t num_tokens;
  std::int64_t in_features;
  std::int64_t out_features;
  std::int64_t x_stride;
  DType dtype;  // of out, x and bias
};

// Bytes of scratch memory: for each row its integers (int16 at most), its scale and its sum over every group of
// columns. The parts are padded to whole cache lines.
constexpr std::int64_t quantized_scratch_bytes(std::int64_t num_tokens, std::int64_t in_features, std::int64_t groups) {
  return num_tokens * (ceil_div(in_features, 8) * 16 + 4 + groups * 4) + 3 * 64;
}

}  // namespace dpn
