// Rotary position embedding of queries and keys, fused with storing keys and values in the paged cache.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

struct RopeStoreParams {
  void* qkv;                        // [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], row stride qkv_stride
  void* kv_cache;                   // [num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]
  const std::int32_t* positions;    // [num_tokens] rotary position of each row
  const std::int32_t* cache_rows;   // [num_tokens] row of the sequence's KV cache that each row is stored in
  const float* cos_sin;             // [max_positions, head_dim]: head_dim / 2 cosines, then head_dim / 2 sines
  const std::int32_t* block_table;  // [num_seqs, max_blocks]
  const std::int32_t* cu_seqlens;   // [num_seqs + 1]
  const void* q_norm;               // [head_dim] weight of the queries' norm; null where heads are not normed
  const void* k_norm;               // [head_dim] of the keys' norm; null together with q_norm
  float eps;                        // of both norms
  std::int64_t num_tokens;
  std::int64_t num_seqs;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  std::int64_t qkv_stride;
  std::int64_t layers_per_block;
  std::int64_t layer_in_block;
  std::int64_t block_size;
  std::int64_t max_blocks;
  DType dtype;
};

// Rotates the query and key heads of `qkv` in place by the angles of positions[t], and writes keys and values of row t
// of sequence b to row cache_rows[t] % block_size of block block_table[b, cache_rows[t] / block_size]. With q_norm and
// k_norm each head is divided by its root mean square and multiplied by the weight first (RMSNorm).
void rope_store(const Tensor& qkv, const Tensor& positions, const Tensor& cache_rows, const Tensor& cos_sin,
                const Tensor& kv_cache, std::int64_t layer_in_block, const Tensor& block_table,
                const Tensor& cu_seqlens, std::int64_t num_heads, std::int64_t num_kv_heads,
                const OptionalTensor& q_norm, const OptionalTensor& k_norm, float eps, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(rope_store_kernel, RopeStoreParams)
DPN_DECLARE_CUDA_KERNEL(rope_store_kernel, RopeStoreParams)
