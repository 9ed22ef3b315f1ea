#include "ops/reduction/last_row_scores.h"

#include <vector>

#include "core/check.h"
#include "ops/attention/checks.h"
#include "ops/attention/decode_splits.h"
#include "ops/reduction/last_row_plan.h"

namespace dpn {

namespace {

void run(const LastRowScoresParams& params, const Tensor& q,
         Stream stream){DPN_CALL_KERNEL(last_row_scores_kernel, params, q, stream)}

std::int64_t partials_size(const Tensor& q, int num_splits) {
  return q.shape[0] * q.shape[1] * num_splits * 2;
}

int splits_of(const Tensor& q, std::int64_t num_kv_heads, std::int64_t most_keys) {
  if constexpr (kHasCuda) {
    if (q.device != Device::cuda) return 1;
    const cuda::DeviceScope device(q.device_index);
    return num_decode_splits(q.shape[0], q.shape[1], num_kv_heads, most_keys, cuda::num_multiprocessors());
  }
  return (void)q, (void)num_kv_heads, (void)most_keys, 1;
}

// Checks the shapes of the output and of the segments, and returns the segments.
Segments segments_of(const Checker& check, const Tensor& out, const Tensor& segment_queries,
                     const Tensor& segment_starts, const Tensor& cu_scores) {
  Dim num_segments("num_segments"), num_scores("num_scores");
  check.contiguous("segment_queries", segment_queries, {&num_segments}, {DType::i32})
      .contiguous("segment_starts", segment_starts, {&num_segments}, {DType::i32});
  Dim num_offsets("num_segments + 1", num_segments + 1);
  check.contiguous("cu_scores", cu_scores, {&num_offsets}, {DType::i32})
      .contiguous("out", out, {&num_scores}, {DType::f32})
      .no_overlap(
          {{"out", &out}},
          {{"segment_queries", &segment_queries}, {"segment_starts", &segment_starts}, {"cu_scores", &cu_scores}});
  return {.queries = segment_queries.as<std::int32_t>(),
          .starts = segment_starts.as<std::int32_t>(),
          .cu_scores = cu_scores.as<std::int32_t>(),
          .num_segments = num_segments};
}

// Checks that the segments lie within the keys of their queries. lengths: [num_queries].
void check_segments(const Checker& check, const Segments& segments, const std::vector<std::int32_t>& lengths,
                    std::int64_t num_scores) {
  const auto num_queries = static_cast<std::int64_t>(lengths.size());
  check_offsets(check, "cu_scores", segments.cu_scores, segments.num_segments, num_scores, "num_scores");
  for (std::int64_t s = 0; s < segments.num_segments; ++s) {
    const std::int64_t query = segments.queries[s], start = segments.starts[s];
    const std::int64_t count = segments.cu_scores[s + 1] - segments.cu_scores[s];
    if (query < 0 || query >= num_queries) check.range(at("segment_queries", s).c_str(), query, 0, num_queries - 1);
    const std::int64_t length = lengths[static_cast<std::size_t>(query)];
    if (start < 0 || start + count > length) {
      check.fail(at("segment_starts", s) + " is " + std::to_string(start) + " with " + std::to_string(count) +
                 " scores, but query " + std::to_string(query) + " sees " + std::to_string(length) + " keys");
    }
  }
}

// Checks that each query sees at least its last key. A query without keys is not looked at.
void check_first_keys(const Checker& check, const std::int32_t* first_keys, const std::vector<std::int32_t>& lengths) {
  for (std::size_t query = 0; query < lengths.size(); ++query) {
    const std::int32_t first = first_keys[query], length = lengths[query];
    const auto place = static_cast<std::int64_t>(query);
    if (length > 0 && (first < 0 || first >= length)) {
      check.range(at("first_keys", place).c_str(), first, 0, length - 1);
    }
  }
}

// The number of keys of each query, but 0 where none of its rows gets a score.
std::vector<std::int32_t> scored_lengths(const Segments& segments, const std::vector<std::int32_t>& lengths) {
  std::vector<std::int32_t> scored(lengths.size());
  for (std::int64_t s = 0; s < segments.num_segments; ++s) {
    const auto query = static_cast<std::size_t>(segments.queries[s]);
    if (segments.cu_scores[s + 1] > segments.cu_scores[s]) scored[query] = lengths[query];
  }
  return scored;
}

// Checks the segments and runs on the CPU, wave after wave. lengths: [num_queries] number of keys of each query.
void run_on_cpu(const Checker& check, LastRowScoresParams params, const std::vector<std::int32_t>& lengths,
                const Tensor& q) {
  check_segments(check, params.segments, lengths, params.num_scores);
  if (params.first_keys) check_first_keys(check, params.first_keys, lengths);
  params.kv_lengths = lengths.data();
  const std::int64_t key_bytes = params.num_kv_heads * params.head_dim * (params.dtype == DType::f32 ? 4 : 2);
  const LastRowPlan plan =
      plan_last_rows(scored_lengths(params.segments, lengths), params.num_heads, params.num_kv_heads, key_bytes);
  params.keys_per_task = plan.keys_per_task;
  params.head_parts = plan.head_parts;
  for (const LastRowWave& wave : plan.waves) {
    params.tasks = wave.tasks.data();
    params.num_tasks = static_cast<std::int64_t>(wave.tasks.size());
    params.first_task = wave.first_task.data();
    run(params, q, 0);
  }
}

void run_on_cuda(const Checker& check, LastRowScoresParams params, const Tensor& q, std::int64_t most_keys,
                 const OptionalTensor& workspace, Stream stream) {
  check.condition(workspace.has_value(), "workspace is None, expected last_row_scores_workspace_size elements");
  params.num_splits = splits_of(q, params.num_kv_heads, most_keys);
  Dim workspace_size("workspace_size");
  check.contiguous("workspace", *workspace, {&workspace_size}, {DType::f32})
      .range("workspace_size", workspace_size, last_row_scores_workspace_size(q, params.num_kv_heads, most_keys),
             INT64_MAX);
  params.partials = workspace->as<float>();
  params.totals = params.partials + partials_size(q, params.num_splits);
  run(params, q, stream);
}

}  // namespace

std::int64_t last_row_scores_workspace_size(const Tensor& q, std::int64_t num_kv_heads, std::int64_t most_keys) {
  // The ops themselves refuse other ranks and sizes.
  if (q.device != Device::cuda || q.ndim != 3 || num_kv_heads < 1 || q.shape[1] < num_kv_heads) return 0;
  return partials_size(q, splits_of(q, num_kv_heads, most_keys)) + partials_size(q, 1);
}

void last_row_scores(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& cu_seqlens,
                     const Tensor& segment_queries, const Tensor& segment_starts, const Tensor& cu_scores,
                     const OptionalTensor& first_keys, float scale, const OptionalTensor& workspace, Stream stream) {
  const Checker check("last_row_scores", q);
  Dim num_queries("num_queries"), num_heads("num_heads"), num_kv_heads("num_kv_heads"), head_dim("head_dim");
  Dim num_tokens("num_tokens");
  check.tensor("q", q, {&num_queries, &num_heads, &head_dim}, check.floats())
      .tensor("k", k, {&num_tokens, &num_kv_heads, &head_dim}, {q.dtype});
  Dim num_offsets("num_queries + 1", num_queries + 1);
  check.contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32});
  check_heads(check, num_heads, num_kv_heads, head_dim, scale);
  const Segments segments = segments_of(check, out, segment_queries, segment_starts, cu_scores);
  check.no_overlap({{"out", &out}}, {{"q", &q}, {"k", &k}, {"cu_seqlens", &cu_seqlens}});
  check_addresses(check, "q", q);
  check_addresses(check, "k", k);
  const auto* offsets = cu_seqlens.as<std::int32_t>();
  const LastRowScoresParams params{.out = out.as<float>(),
                                   .q = q.data,
                                   .cu_seqlens = offsets,
                                   .k = k.data,
                                   .paged = {},
                                   .kv_lengths = nullptr,
                                   .first_keys = first_keys_of(check, first_keys, num_queries, out),
                                   .segments = segments,
                                   .q_stride = {q.strides[0], q.strides[1]},
                                   .k_stride = {k.strides[0], k.strides[1]},
                                   .num_scores = out.shape[0],
                                   .num_queries = num_queries,
                                   .num_heads = num_heads,
                                   .num_kv_heads = num_kv_heads,
                                   .head_dim = head_dim,
                                   .scale = scale,
                                   .dtype = q.dtype,
                                   .tasks = nullptr,
                                   .num_tasks = 0,
                                   .first_task = nullptr,
                                   .keys_per_task = 0,
                                   .head_parts = 0,
                                   .num_splits = 0,
                                   .partials = nullptr,
                                   .totals = nullptr};
  if (!check.can_read()) return run_on_cuda(check, params, q, num_tokens, workspace, stream);
  check_offsets(check, "cu_seqlens", offsets, num_queries, num_tokens);
  std::vector<std::int32_t> lengths;
  for (std::int64_t i = 0; i < num_queries; ++i) lengths.push_back(offsets[i + 1] - offsets[i]);
  run_on_cpu(check, params, lengths, q);
}

void last_row_scores_paged(const Tensor& out, const Tensor& q, const Tensor& blocks, std::int64_t layer_in_block,
                           const Tensor& block_table, const Tensor& kv_lengths, const Tensor& segment_queries,
                           const Tensor& segment_starts, const Tensor& cu_scores, const OptionalTensor& first_keys,
                           float scale, const OptionalTensor& workspace, Stream stream) {
  const Checker check("last_row_scores_paged", q);
  Dim num_queries("num_queries"), num_heads("num_heads"), head_dim("head_dim"), num_blocks("num_blocks");
  Dim layers_per_block("layers_per_block"), keys_and_values("2", 2), num_kv_heads("num_kv_heads");
  Dim block_size("block_size"), max_blocks("max_blocks");
  check.tensor("q", q, {&num_queries, &num_heads, &head_dim}, check.floats())
      .contiguous("blocks", blocks,
                  {&num_blocks, &layers_per_block, &keys_and_values, &num_kv_heads, &block_size, &head_dim}, {q.dtype})
      .contiguous("block_table", block_table, {&num_queries, &max_blocks}, {DType::i32})
      .contiguous("kv_lengths", kv_lengths, {&num_queries}, {DType::i32});
  check_heads(check, num_heads, num_kv_heads, head_dim, scale);
  check.range("layer_in_block", layer_in_block, 0, layers_per_block - 1).range("block_size", block_size, 1, INT32_MAX);
  const Segments segments = segments_of(check, out, segment_queries, segment_starts, cu_scores);
  check.no_overlap({{"out", &out}},
                   {{"q", &q}, {"blocks", &blocks}, {"block_table", &block_table}, {"kv_lengths", &kv_lengths}});
  check_addresses(check, "q", q);
  check_addresses(check, "blocks", blocks);
  const auto* lengths = kv_lengths.as<std::int32_t>();
  const LastRowScoresParams params{.out = out.as<float>(),
                                   .q = q.data,
                                   .cu_seqlens = nullptr,
                                   .k = nullptr,
                                   .paged = paged_keys(blocks, block_table, layer_in_block),
                                   .kv_lengths = lengths,
                                   .first_keys = first_keys_of(check, first_keys, num_queries, out),
                                   .segments = segments,
                                   .q_stride = {q.strides[0], q.strides[1]},
                                   .k_stride = {0, 0},
                                   .num_scores = out.shape[0],
                                   .num_queries = num_queries,
                                   .num_heads = num_heads,
                                   .num_kv_heads = num_kv_heads,
                                   .head_dim = head_dim,
                                   .scale = scale,
                                   .dtype = q.dtype,
                                   .tasks = nullptr,
                                   .num_tasks = 0,
                                   .first_task = nullptr,
                                   .keys_per_task = 0,
                                   .head_parts = 0,
                                   .num_splits = 0,
                                   .partials = nullptr,
                                   .totals = nullptr};
  if (!check.can_read()) return run_on_cuda(check, params, q, max_blocks * block_size, workspace, stream);
  check_blocks(check, block_table, "kv_lengths", kv_lengths, 0, num_blocks, block_size);
  run_on_cpu(check, params, {lengths, lengths + num_queries}, q);
}

}  // namespace dpn
