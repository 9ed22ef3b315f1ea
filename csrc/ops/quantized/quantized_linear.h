// What linear_int8 and linear_int4 share: rows of x are quantised to int8, each by itself, and multiplied by weights
// that lie in memory in the order in which dot products of 4 columns read them.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace dpn {

constexpr std::int64_t kPanelRows = 16;  // weight rows that lie together
// Beyond, an int32 could overflow: products are at most 128 * 128.
constexpr std::int64_t kMostInFeatures = 131071;

// Rows of x up to which no instruction set takes tiles: memory is the limit.
constexpr std::int64_t kMostStreamedRows = 12;

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
// columns, then for each thread two panels of weights in 8 bits, where many rows are multiplied with tiles of 16 groups
// of 4 columns. Such tiles also read up to 31 rows too many. The parts are padded to whole cache lines.
constexpr std::int64_t quantized_scratch_bytes(std::int64_t num_tokens, std::int64_t in_features, std::int64_t groups,
                                               std::int64_t num_threads) {
  const std::int64_t columns = ceil_div(in_features, 64) * 64;
  const std::int64_t panels = num_tokens > kMostStreamedRows ? num_threads * 2 * kPanelRows * columns : 0;
  return (2 * num_tokens + 31) * columns + num_tokens * (4 + groups * 4) + panels + 4 * 64;
}

}  // namespace dpn
