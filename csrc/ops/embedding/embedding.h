// Rows of the table of token embeddings, on the CPU. On a GPU they are torch's.
#pragma once

#include "ops/quantized/quantized_linear.h"

namespace dpn {

constexpr std::int64_t kTileColumns = 4;  // of a table in tiles; it has kPanelRows rows

struct EmbeddingParams {
  void* out;                      // [num_tokens, hidden_size]
  const void* table;              // [vocab_size, hidden_size] of out's dtype, or tiles as of linear_int8
  const float* scale;             // [vocab_size] of a table in tiles, or null
  const std::int64_t* token_ids;  // [num_tokens], below 0: row 0
  std::int64_t num_tokens;
  std::int64_t hidden_size;
  DType dtype;
};

void embedding(const Tensor& out, const Tensor& table, const OptionalTensor& scale, const Tensor& token_ids);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(embedding_kernel, EmbeddingParams)
