// What linear_int8 and linear_int4 share: rows of x are quantised to int8, each by itself, and multiplied by weights
// that lie in memory in the order in which dot products of 4 columns read them.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "ops/activation/activation.h"

namespace dpn {

constexpr std::int64_t kPanelRows = 16;  // weight rows that lie together
// Beyond, an int32 could overflow: products are at most 128 * 128.
constexpr std::int64_t kMostInFeatures = 131071;

// Rows of x up to which no instruction set takes tiles: memory is the limit.
constexpr std::int64_t kMostStreamedRows = 12;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct QuantizedLinearParams {
  void* out;                   // [num_tokens, out_columns()]
  const void* x;               // [num_tokens, in_features], row stride x_stride
  const std::uint8_t* weight;  // tiles, see linear_int8.h and linear_int4.h
  const void* scale;           // of the weights, see there
  const void* bias;            // [out_features], or null
  void* scratch;               // quantized_scratch_bytes, aligned to 64 bytes
  std::int64_t num_tokens;
  std::int64_t in_features;
  std::int64_t out_features;
  std::int64_t x_stride;
  ActivationKind activation = ActivationKind::none;
  DType dtype;  // of out, x and bias

  // silu_mul makes one column of two: weights of the gate, then those of up, kPanelRows or a multiple each.
  bool is_gated() const { return activation == ActivationKind::silu_mul; }
  std::int64_t out_columns() const { return is_gated() ? out_features / 2 : out_features; }
};

constexpr std::int64_t padded_columns(std::int64_t in_features) { return ceil_div(in_features, 64) * 64; }

// With tiles (AMX), 64 weights at a time: blocks of 32 rows in a chunk of rows that stays, with its sums, in the
// second-level cache of 2 MiB.
constexpr std::int64_t kAmxBlockBytes = 32 * 32 * 4;
constexpr std::int64_t amx_blocks_in_chunk(std::int64_t num_tokens, std::int64_t in_features) {
  constexpr std::int64_t kChunkBytes = 1024 * 1024, kSumsOfRow = 2 * kAmxBlockBytes / 32;
  const std::int64_t blocks = ceil_div(num_tokens, 32);
  const std::int64_t chunks = ceil_div(num_tokens * (padded_columns(in_features) + kSumsOfRow), kChunkBytes);
  return ceil_div(blocks, chunks < blocks ? chunks : blocks);
}

// With tiles: parts of the columns for which 32 rows of weights and of x stay in the first-level cache of 48 KiB.
constexpr std::int64_t amx_parts(std::int64_t in_features) {
  constexpr std::int64_t kPart = 512;
  const std::int64_t columns = padded_columns(in_features);
  return columns < kPart * 3 / 2 ? 1 : ceil_div(columns, kPart);
}

// With tiles, each thread needs two panels of weights in 8 bits, and the sums of a chunk.
constexpr std::int64_t amx_bytes_of_thread(std::int64_t num_tokens, std::int64_t in_features) {
  return 2 * kPanelRows * padded_columns(in_features) +
         amx_blocks_in_chunk(num_tokens, in_features) * 2 * kAmxBlockBytes;
}

// Bytes of scratch memory: for each row its integers (int16 at most), its scale and its sum over every group of
// columns, then what each thread needs where many rows are multiplied with tiles, which also read up to 31 rows too
// many. The parts are padded to whole cache lines.
constexpr std::int64_t quantized_scratch_bytes(std::int64_t num_tokens, std::int64_t in_features, std::int64_t groups,
                                               std::int64_t num_threads) {
  const std::int64_t of_threads =
      num_tokens > kMostStreamedRows ? num_threads * amx_bytes_of_thread(num_tokens, in_features) : 0;
  return (2 * num_tokens + 31) * padded_columns(in_features) + num_tokens * (4 + groups * 4) + of_threads + 4 * 64;
}

}  // namespace dpn
