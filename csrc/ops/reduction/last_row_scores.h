// How much the last row of each prompt attends to the rows of its images. A segment is the visual rows of one image.
// The score of a row is the mean over query heads of its weight in the softmax over all keys that the query sees.
// Grouped-query: query head h reads key head h / (num_heads / num_kv_heads).
#pragma once

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"
#include "ops/attention/attention.h"

namespace dpn {

// The rows that get a score. A query may have any number of segments, in any order.
struct Segments {
  const std::int32_t* queries;    // [num_segments]
  const std::int32_t* starts;     // [num_segments] first row, counted from the query's first key
  const std::int32_t* cu_scores;  // [num_segments + 1] first score of each segment, then num_scores
  std::int64_t num_segments;
};

struct LastRowScoresParams {
  float* out;                      // [num_scores]
  const void* q;                   // [num_queries, num_heads, head_dim]
  const std::int32_t* cu_seqlens;  // [num_queries + 1] of the rows of k; null where keys are paged
  const void* k;                   // [num_tokens, num_kv_heads, head_dim]
  PagedKeys paged;                 // where cu_seqlens is null (k is null too where there are no rows)
  const std::int32_t* kv_lengths;  // [num_queries] keys of each query; null on the GPU where they are packed
  const std::int32_t* first_keys;  // [num_queries] first key that each query sees; those before it get 0. Null: key 0
  Segments segments;
  std::int64_t q_stride[2];  // of queries, of heads
  std::int64_t k_stride[2];  // of tokens, of heads
  std::int64_t num_scores;
  std::int64_t num_queries;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  float scale;
  DType dtype;
  const DecodeTask* tasks;  // [num_tasks] of one wave (LastRowWave); this and the next four are for the CPU only
  std::int64_t num_tasks;
  const std::int32_t* first_task;  // [num_queries]
  std::int64_t keys_per_task;
  std::int64_t head_parts;  // number of parts that the key heads of a task are divided into
  int num_splits;           // number of parts of the keys; this and the next two are for the GPU only
  float* partials;          // [num_queries, num_heads, num_splits, 2]: maximum and sum of a part of the keys
  float* totals;            // [num_queries, num_heads, 2]: maximum and factor of all of them
};

// workspace: float32, needed on the GPU only.
void last_row_scores(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& cu_seqlens,
                     const Tensor& segment_queries, const Tensor& segment_starts, const Tensor& cu_scores,
                     const OptionalTensor& first_keys, float scale, const OptionalTensor& workspace, Stream stream);
void last_row_scores_paged(const Tensor& out, const Tensor& q, const Tensor& blocks, std::int64_t layer_in_block,
                           const Tensor& block_table, const Tensor& kv_lengths, const Tensor& segment_queries,
                           const Tensor& segment_starts, const Tensor& cu_scores, const OptionalTensor& first_keys,
                           float scale, const OptionalTensor& workspace, Stream stream);
// Number of elements of the workspace for such tensors, 0 on the CPU. most_keys: at least the keys that a query sees.
std::int64_t last_row_scores_workspace_size(const Tensor& q, std::int64_t num_kv_heads, std::int64_t most_keys);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(last_row_scores_kernel, LastRowScoresParams)
DPN_DECLARE_CUDA_KERNEL(last_row_scores_kernel, LastRowScoresParams)
