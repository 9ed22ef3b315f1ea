// Softmax attention with grouped queries: query head h reads key/value head h / (num_heads / num_kv_heads).
//
// attention: packed sequences over their own rows (prefill, vision tower).
// attention_extend: several new rows per sequence over paged keys and values (a prefill whose first rows are cached).
// attention_decode: one new row per sequence over paged keys and values.
//
// Which rows a row sees depends only on the order of rows, given by cu_seqlens in a packed batch and by cache rows in
// the cache. A sequence has context_lens cache rows, and its new rows are the last of them. Rotary positions do not
// matter here; rope_store has applied them. Where attention has a sliding window, first_keys says for each row where
// its window begins; the caller finds that by positions.
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/divisor.h"
#include "core/tensor.h"
#include "ops/attention/plan.h"

namespace dpn {

constexpr std::int64_t kMaxHeadDim = 256;

// Keys and values in the blocks of a KV cache.
struct PagedKeys {
  const void* kv_cache;             // [num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]
  const std::int32_t* block_table;  // [num_seqs, max_blocks]
  std::int64_t max_blocks;
  std::int64_t block_size;
  std::int64_t layers_per_block;
  std::int64_t layer_in_block;
  Divisor block_divisor;  // divides by block_size; for the GPU only
};

struct AttentionParams {
  void* out;                         // [num_tokens, num_heads, head_dim]
  const void* q;                     // [num_tokens, num_heads, head_dim]
  const void* k;                     // [num_tokens, num_kv_heads, head_dim]; null where keys and values are paged
  const void* v;                     // [num_tokens, num_kv_heads, head_dim]; null where keys and values are paged
  PagedKeys paged;                   // used where k and v are null
  const std::int32_t* cu_seqlens;    // [num_seqs + 1] offsets of the rows of q and out
  const std::int32_t* context_lens;  // [num_seqs] number of keys of each sequence; its rows of q have the last ones.
                                     // Null on the GPU where a sequence has no other keys
  const std::int32_t* first_keys;    // [num_tokens] first key of its sequence that each row sees; never falls within a
                                     // sequence. Null: key 0. Only with `causal`
  std::int64_t q_stride[2];          // between tokens, between heads
  std::int64_t k_stride[2];
  std::int64_t v_stride[2];
  std::int64_t num_tokens;
  std::int64_t num_seqs;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  float scale;
  bool causal;
  DType dtype;
  const Wave* waves;  // this and the next members: for the CPU only
  std::int64_t num_waves;
  std::int64_t max_elements;  // largest size of a wave's packed heads
};

struct AttentionDecodeParams {
  void* out;      // [num_seqs, num_heads, head_dim]
  const void* q;  // [num_seqs, num_heads, head_dim]
  PagedKeys paged;
  const std::int32_t* context_lens;  // [num_seqs]
  const std::int32_t* first_keys;    // [num_seqs] first key that each row sees; null: key 0
  std::int64_t q_stride[2];          // between sequences, between heads
  std::int64_t num_seqs;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  float scale;
  DType dtype;
  const DecodeTask* tasks;  // this and the next two members: for the CPU only
  std::int64_t num_tasks;
  const std::int32_t* first_task;  // [num_seqs + 1], see DecodePlan
  int num_splits;                  // this and the next member: for the GPU only
  float* partials;                 // [num_seqs, num_heads, num_splits, head_dim + 2], null for one split
};

void attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
               const OptionalTensor& first_keys, bool causal, float scale, Stream stream);
void attention_extend(const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_block,
                      const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& context_lens,
                      const OptionalTensor& first_keys, float scale, Stream stream);
void attention_decode(const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_block,
                      const Tensor& block_table, const Tensor& context_lens, const OptionalTensor& first_keys,
                      float scale, const OptionalTensor& workspace, Stream stream);
// Number of elements of the float32 workspace that attention_decode needs for tensors of these shapes; 0 on the CPU.
std::int64_t attention_decode_workspace_size(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(attention_kernel, AttentionParams)
DPN_DECLARE_CPU_KERNEL(attention_decode_kernel, AttentionDecodeParams)
DPN_DECLARE_CUDA_KERNEL(attention_kernel, AttentionParams)
DPN_DECLARE_CUDA_KERNEL(attention_decode_kernel, AttentionDecodeParams)
