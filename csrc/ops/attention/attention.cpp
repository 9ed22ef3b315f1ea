#include "ops/attention/attention.h"

#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/attention/checks.h"
#include "ops/attention/decode_splits.h"

namespace dpn {

namespace {

// The plan of a prefill on the CPU. It is empty on the GPU, where the kernel finds its work by itself.
PrefillPlan plan_of(const Checker& check, const std::int32_t* offsets, const std::int32_t* lengths,
                    const std::int32_t* first_keys, std::int64_t num_seqs, std::int64_t num_heads,
                    std::int64_t num_kv_heads, std::int64_t head_dim, bool causal) {
  if (!check.can_read()) return {};
  return plan_prefill(offsets, lengths, first_keys, num_seqs, num_heads, num_kv_heads, head_dim, causal, max_threads());
}

void run(const AttentionParams& params, const Tensor& q, Stream stream) {
  DPN_TRY_CUDA_KERNEL(attention_kernel, params, q, stream)
  const CpuIsa isa = cpu_isa(TunedOp::attention);
  DPN_TRY_amx(isa, attention_kernel, params) DPN_CALL_CPU_KERNEL_OF(isa, attention_kernel, params)
}
void run(const AttentionDecodeParams& params, const Tensor& q, Stream stream) {
  DPN_TRY_CUDA_KERNEL(attention_decode_kernel, params, q, stream)
  const bool grouped = params.num_heads > params.num_kv_heads;
  const CpuIsa isa = cpu_isa(grouped ? TunedOp::attention_decode_grouped : TunedOp::attention_decode);
  DPN_TRY_amx(isa, attention_decode_kernel, params) DPN_CALL_CPU_KERNEL_OF(isa, attention_decode_kernel, params)
}

// Number of splits on the GPU, from tensors whose shapes were checked. The CPU plans by itself.
int splits_of(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table) {
  if constexpr (kHasCuda) {
    if (q.device != Device::cuda) return 1;
    const cuda::DeviceScope device(q.device_index);
    return num_decode_splits(q.shape[0], q.shape[1], kv_cache.shape[3], block_table.shape[1] * kv_cache.shape[4],
                             cuda::num_multiprocessors());
  }
  return (void)q, (void)kv_cache, (void)block_table, 1;
}

}  // namespace

std::int64_t attention_decode_workspace_size(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table) {
  // attention_decode itself refuses other ranks and sizes.
  if (q.ndim != 3 || kv_cache.ndim != 6 || block_table.ndim != 2) return 0;
  if (kv_cache.shape[3] < 1 || q.shape[1] < kv_cache.shape[3]) return 0;
  const int num_splits = splits_of(q, kv_cache, block_table);
  return num_splits == 1 ? 0 : q.shape[0] * q.shape[1] * num_splits * (q.shape[2] + 2);
}

void attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
               const OptionalTensor& first_keys, bool causal, float scale, Stream stream) {
  const Checker check("attention", q);
  Dim num_tokens("num_tokens"), num_heads("num_heads"), num_kv_heads("num_kv_heads"), head_dim("head_dim");
  Dim num_offsets("num_seqs + 1");
  check.tensor("q", q, {&num_tokens, &num_heads, &head_dim}, check.attention_floats())
      .tensor("k", k, {&num_tokens, &num_kv_heads, &head_dim}, {q.dtype})
      .tensor("v", v, {&num_tokens, &num_kv_heads, &head_dim}, {q.dtype})
      .contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32});
  Dim hidden_size("num_heads*head_dim", num_heads * head_dim);
  check.contiguous("out", out, {&num_tokens, &hidden_size}, {q.dtype})
      .no_overlap("out", out, "q", q)
      .no_overlap("out", out, "k", k)
      .no_overlap("out", out, "v", v);
  check_heads(check, num_heads, num_kv_heads, head_dim, scale);
  check.condition(num_offsets > 0, "cu_seqlens is empty, expected num_seqs + 1 entries");
  const std::int32_t* firsts = first_keys_of(check, first_keys, num_tokens, out);
  check.condition(causal || !firsts, "first_keys is given, expected None where attention is not causal");
  for (const auto& [argument, tensor] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}}) {
    check_addresses(check, argument, *tensor);
  }
  const auto* offsets = cu_seqlens.as<std::int32_t>();
  std::vector<std::int32_t> lengths;
  if (check.can_read()) {
    check_padded_offsets(check, "cu_seqlens", offsets, num_offsets - 1, num_tokens);
    lengths.resize(static_cast<std::size_t>(num_offsets - 1));
    for (std::size_t s = 0; s < lengths.size(); ++s) lengths[s] = offsets[s + 1] - offsets[s];
    if (firsts) check_first_keys(check, firsts, offsets, lengths.data(), num_offsets - 1);
  }
  const PrefillPlan plan =
      plan_of(check, offsets, lengths.data(), firsts, num_offsets - 1, num_heads, num_kv_heads, head_dim, causal);
  run(AttentionParams{.out = out.data,
                      .q = q.data,
                      .k = k.data,
                      .v = v.data,
                      .paged = {},
                      .cu_seqlens = offsets,
                      .context_lens = check.can_read() ? lengths.data() : nullptr,
                      .first_keys = firsts,
                      .q_stride = {q.strides[0], q.strides[1]},
                      .k_stride = {k.strides[0], k.strides[1]},
                      .v_stride = {v.strides[0], v.strides[1]},
                      .num_tokens = num_tokens,
                      .num_seqs = num_offsets - 1,
                      .num_heads = num_heads,
                      .num_kv_heads = num_kv_heads,
                      .head_dim = head_dim,
                      .scale = scale,
                      .causal = causal,
                      .dtype = q.dtype,
                      .waves = plan.waves.data(),
                      .num_waves = static_cast<std::int64_t>(plan.waves.size()),
                      .max_elements = plan.max_elements},
      q, stream);
}

void attention_extend(const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_block,
                      const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& context_lens,
                      const OptionalTensor& first_keys, float scale, Stream stream) {
  const Checker check("attention_extend", q);
  Dim num_tokens("num_tokens"), num_heads("num_heads"), head_dim("head_dim"), num_blocks("num_blocks");
  Dim layers_per_block("layers_per_block"), keys_and_values("2", 2), num_kv_heads("num_kv_heads");
  Dim block_size("block_size"), max_blocks("max_blocks"), num_seqs("num_seqs");
  check.tensor("q", q, {&num_tokens, &num_heads, &head_dim}, check.attention_floats())
      .contiguous("kv_cache", kv_cache,
                  {&num_blocks, &layers_per_block, &keys_and_values, &num_kv_heads, &block_size, &head_dim}, {q.dtype})
      .contiguous("block_table", block_table, {&num_seqs, &max_blocks}, {DType::i32})
      .contiguous("context_lens", context_lens, {&num_seqs}, {DType::i32});
  Dim num_offsets("num_seqs + 1", num_seqs + 1), hidden_size("num_heads*head_dim", num_heads * head_dim);
  check.contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32})
      .contiguous("out", out, {&num_tokens, &hidden_size}, {q.dtype})
      .no_overlap("out", out, "q", q)
      .no_overlap("out", out, "kv_cache", kv_cache);
  check_heads(check, num_heads, num_kv_heads, head_dim, scale);
  check.range("layer_in_block", layer_in_block, 0, layers_per_block - 1).range("block_size", block_size, 1, INT32_MAX);
  for (const auto& [argument, tensor] : {std::pair{"q", &q}, {"kv_cache", &kv_cache}, {"out", &out}}) {
    check_addresses(check, argument, *tensor);
  }
  const auto* offsets = cu_seqlens.as<std::int32_t>();
  const auto* lengths = context_lens.as<std::int32_t>();
  const std::int32_t* firsts = first_keys_of(check, first_keys, num_tokens, out);
  if (check.can_read()) {
    check_padded_offsets(check, "cu_seqlens", offsets, num_seqs, num_tokens);
    check_blocks(check, block_table, "context_lens", context_lens, 1, num_blocks, block_size);
  }
  for (std::int64_t s = 0; check.can_read() && s < num_seqs; ++s) {
    if (const std::int32_t rows = offsets[s + 1] - offsets[s]; lengths[s] < rows) {
      check.fail("context_lens[" + std::to_string(s) + "] is " + std::to_string(lengths[s]) +
                 ", expected at least the sequence's " + std::to_string(rows) + " new rows");
    }
  }
  if (check.can_read() && firsts) check_first_keys(check, firsts, offsets, lengths, num_seqs);
  const PrefillPlan plan = plan_of(check, offsets, lengths, firsts, num_seqs, num_heads, num_kv_heads, head_dim, true);
  run(AttentionParams{.out = out.data,
                      .q = q.data,
                      .k = nullptr,
                      .v = nullptr,
                      .paged = paged_keys(kv_cache, block_table, layer_in_block),
                      .cu_seqlens = offsets,
                      .context_lens = lengths,
                      .first_keys = firsts,
                      .q_stride = {q.strides[0], q.strides[1]},
                      .k_stride = {0, 0},
                      .v_stride = {0, 0},
                      .num_tokens = num_tokens,
                      .num_seqs = num_seqs,
                      .num_heads = num_heads,
                      .num_kv_heads = num_kv_heads,
                      .head_dim = head_dim,
                      .scale = scale,
                      .causal = true,
                      .dtype = q.dtype,
                      .waves = plan.waves.data(),
                      .num_waves = static_cast<std::int64_t>(plan.waves.size()),
                      .max_elements = plan.max_elements},
      q, stream);
}

void attention_decode(const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_block,
                      const Tensor& block_table, const Tensor& context_lens, const OptionalTensor& first_keys,
                      float scale, const OptionalTensor& workspace, Stream stream) {
  const Checker check("attention_decode", q);
  Dim num_seqs("num_seqs"), num_heads("num_heads"), head_dim("head_dim"), num_blocks("num_blocks");
  Dim layers_per_block("layers_per_block"), keys_and_values("2", 2), num_kv_heads("num_kv_heads");
  Dim block_size("block_size"), max_blocks("max_blocks");
  check.tensor("q", q, {&num_seqs, &num_heads, &head_dim}, check.attention_floats())
      .contiguous("kv_cache", kv_cache,
                  {&num_blocks, &layers_per_block, &keys_and_values, &num_kv_heads, &block_size, &head_dim}, {q.dtype})
      .contiguous("block_table", block_table, {&num_seqs, &max_blocks}, {DType::i32})
      .contiguous("context_lens", context_lens, {&num_seqs}, {DType::i32});
  Dim hidden_size("num_heads*head_dim", num_heads * head_dim);
  check.contiguous("out", out, {&num_seqs, &hidden_size}, {q.dtype})
      .no_overlap("out", out, "q", q)
      .no_overlap("out", out, "kv_cache", kv_cache);
  check_heads(check, num_heads, num_kv_heads, head_dim, scale);
  check.range("layer_in_block", layer_in_block, 0, layers_per_block - 1).range("block_size", block_size, 1, INT32_MAX);
  const std::int32_t* firsts = first_keys_of(check, first_keys, num_seqs, out);
  const auto* lengths = context_lens.as<std::int32_t>();
  if (check.can_read()) check_blocks(check, block_table, "context_lens", context_lens, 1, num_blocks, block_size);
  for (std::int64_t s = 0; check.can_read() && firsts && s < num_seqs; ++s) {
    if (firsts[s] < 0 || firsts[s] >= lengths[s])
      check.range(at("first_keys", s).c_str(), firsts[s], 0, lengths[s] - 1);
  }
  for (const auto& [argument, tensor] : {std::pair{"q", &q}, {"kv_cache", &kv_cache}, {"out", &out}}) {
    check_addresses(check, argument, *tensor);
  }
  const int num_splits = splits_of(q, kv_cache, block_table);
  float* partials = nullptr;
  if (num_splits > 1) {
    check.condition(workspace.has_value(), "workspace is None, expected attention_decode_workspace_size elements");
    Dim workspace_size("workspace_size");
    check.contiguous("workspace", *workspace, {&workspace_size}, {DType::f32});
    const std::int64_t needed = num_seqs * num_heads * num_splits * (head_dim + 2);
    check.range("workspace_size", workspace_size, needed, INT64_MAX);
    partials = workspace->as<float>();
  }

  const DecodePlan plan = check.can_read() ? plan_decode(lengths, firsts, num_seqs, max_threads()) : DecodePlan{};
  run(AttentionDecodeParams{.out = out.data,
                            .q = q.data,
                            .paged = paged_keys(kv_cache, block_table, layer_in_block),
                            .context_lens = lengths,
                            .first_keys = firsts,
                            .q_stride = {q.strides[0], q.strides[1]},
                            .num_seqs = num_seqs,
                            .num_heads = num_heads,
                            .num_kv_heads = num_kv_heads,
                            .head_dim = head_dim,
                            .scale = scale,
                            .dtype = q.dtype,
                            .tasks = plan.tasks.data(),
                            .num_tasks = static_cast<std::int64_t>(plan.tasks.size()),
                            .first_task = plan.first_task.data(),
                            .num_splits = num_splits,
                            .partials = partials},
      q, stream);
}

}  // namespace dpn
