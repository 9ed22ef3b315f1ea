// Checks of the ops that multiply queries by keys.
#pragma once

#include "core/check.h"
#include "ops/attention/attention.h"

namespace dpn {

void check_heads(const Checker& check, std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                 float scale);

// Checks that least <= lengths[s] <= max_blocks * block_size, and that the cache has every block that holds these rows.
// Reads tensors of the CPU. lengths: [num_seqs], called `argument` in messages.
void check_blocks(const Checker& check, const Tensor& block_table, const char* argument, const Tensor& lengths,
                  std::int64_t least, std::int64_t num_blocks, std::int64_t block_size);

// Checks the shape of first_keys, which may be left out, and returns its entries; null without them.
const std::int32_t* first_keys_of(const Checker& check, const OptionalTensor& first_keys, Dim& num_rows,
                                  const Tensor& out);

// Checks the first keys of rows. Each must lie between that of the row before it in its sequence and the row's own key.
// Reads tensors of the CPU. cu_seqlens: [num_seqs + 1], checked; context_lens: [num_seqs] keys of each sequence.
void check_first_keys(const Checker& check, const std::int32_t* first_keys, const std::int32_t* cu_seqlens,
                      const std::int32_t* context_lens, std::int64_t num_seqs);

// Checks what the GPU kernels need: they read 16 bytes at a time and use 32-bit strides in bytes.
void check_addresses(const Checker& check, const char* argument, const Tensor& t);

// Parameters from tensors whose shapes were checked.
PagedKeys paged_keys(const Tensor& kv_cache, const Tensor& block_table, std::int64_t layer_in_block);

}  // namespace dpn
