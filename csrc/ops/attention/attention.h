// Softmax attention of packed sequences over their own rows (prefill, vision tower), of several new rows per sequence
// over paged keys and values (extend: a prefill whose first rows are in the cache), and of one new row per sequence
// over them (decode). Grouped-query: query head h reads key/value head h / (num_heads / num_kv_heads). What a row sees
// depends on the order of the rows alone: in a packed batch on cu_seqlens, in the cache on cache rows, of which a
// sequence has context_lens, the new ones last. Rotary positions play no part; rope_store has applied them.
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
  Divisor block_divisor;  // by block_size; for the GPU only
};

struct AttentionParams {
  void* out;                         // [num_tokens, num_heads, head_dim]
  const void* q;                     // [num_tokens, num_heads, head_dim]
  const void* k;                     // [num_tokens, num_kv_heads, head_dim]; null where keys and values are paged
  const void* v;                     // [num_tokens, num_kv_heads, head_dim]; likewise
  PagedKeys paged;                   // where k and v are null
  const std::int32_t* cu_seqlens;    // [num_seqs + 1] of the rows of q and out
  const std::int32_t* context_lens;  // [num_seqs] keys of each sequence, the last of which are those of its rows of q;
                                     // null on the GPU where it has no others
  std::int64_t q_stride[2];          // of tokens, of heads
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
  const Wave* waves;  // from here on for the CPU only
  std::int64_t num_waves;
  std::int64_t max_elements;  // of a wave's packed heads
};

struct AttentionDecodeParams {
  void* out;      // [num_seqs, num_heads, head_dim]
  const void* q;  // [num_seqs, num_heads, head_dim]
  PagedKeys paged;
  const std::int32_t* context_lens;  // [num_seqs]
  std::int64_t q_stride[2];          // of sequences, of heads
  std::int64_t num_seqs;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  float scale;
  DType dtype;
  const DecodeTask* tasks;  // for the CPU only, as the next two
  std::int64_t num_tasks;
  const std::int32_t* first_task;  // [num_seqs + 1], see DecodePlan
  int num_splits;                  // for the GPU only, as the next
  float* partials;                 // [num_seqs, num_heads, num_splits, head_dim + 2], null for one split
};

void attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
               bool causal, float scale, Stream stream);
void attention_extend(const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_block,
                      const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& context_lens, float scale,
                      Stream stream);
void attention_decode(const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_block,
                      const Tensor& block_table, const Tensor& context_lens, float scale,
                      const OptionalTensor& workspace, Stream stream);
// Elements of the float32 workspace that attention_decode needs for such tensors, 0 on the CPU.
std::int64_t attention_decode_workspace_size(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(attention_kernel, AttentionParams)
DPN_DECLARE_CPU_KERNEL(attention_decode_kernel, AttentionDecodeParams)
DPN_DECLARE_CUDA_KERNEL(attention_kernel, AttentionParams)
DPN_DECLARE_CUDA_KERNEL(attention_decode_kernel, AttentionDecodeParams)
