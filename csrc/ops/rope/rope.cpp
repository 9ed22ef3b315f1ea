#include "ops/rope/rope.h"

#include "core/check.h"

namespace dpn {

namespace {

// Checks that every position of a sequence's row has a row in cos_sin.
void check_positions(const Checker& check, const RopeStoreParams& p, std::int64_t max_positions) {
  for (std::int64_t t = 0; t < p.cu_seqlens[p.num_seqs]; ++t) {
    if (p.positions[t] < 0 || p.positions[t] >= max_positions) {
      check.range(at("positions", t).c_str(), p.positions[t], 0, max_positions - 1);
    }
  }
}

// Checks that every cache row lies in an existing block of its sequence. Only entries of the block table that are in
// use are read: the others may have any value.
void check_cache_rows(const Checker& check, const RopeStoreParams& p, std::int64_t num_blocks) {
  for (std::int64_t b = 0; b < p.num_seqs; ++b) {
    std::int64_t block_begin = 0, block_end = 0;  // rows of the block that was checked last
    for (std::int64_t t = p.cu_seqlens[b]; t < p.cu_seqlens[b + 1]; ++t) {
      const std::int64_t row = p.cache_rows[t];
      if (row >= block_begin && row < block_end) continue;
      const std::int64_t entry = row / p.block_size;
      if (row < 0 || entry >= p.max_blocks) {
        check.fail(at("cache_rows", t) + " is " + std::to_string(row) + ", but block_table holds " +
                   std::to_string(p.max_blocks) + " blocks of " + std::to_string(p.block_size) + " rows");
      }
      const std::int64_t block = p.block_table[b * p.max_blocks + entry];
      if (block < 0 || block >= num_blocks) {
        check.range((at("block_table", b) + "[" + std::to_string(entry) + "]").c_str(), block, 0, num_blocks - 1);
      }
      block_begin = entry * p.block_size;
      block_end = block_begin + p.block_size;
    }
  }
}

void run(const RopeStoreParams& params, const Tensor& qkv, Stream stream) {
  DPN_CALL_KERNEL(rope_store_kernel, params, qkv, stream)
}

}  // namespace

void rope_store(const Tensor& qkv, const Tensor& positions, const Tensor& cache_rows, const Tensor& cos_sin,
                const Tensor& kv_cache, std::int64_t layer_in_block, const Tensor& block_table,
                const Tensor& cu_seqlens, std::int64_t num_heads, std::int64_t num_kv_heads,
                const OptionalTensor& q_norm, const OptionalTensor& k_norm, float eps, Stream stream) {
  const Checker check("rope_store", qkv);
  constexpr std::int64_t kMostHeads = 1 << 20;  // keeps the products below far from overflow
  check.range("num_heads", num_heads, 1, kMostHeads).range("num_kv_heads", num_kv_heads, 1, num_heads);
  check.condition(num_heads % num_kv_heads == 0,
                  "num_heads is " + std::to_string(num_heads) +
                      ", expected a multiple of num_kv_heads=" + std::to_string(num_kv_heads));
  Dim max_positions("max_positions"), head_dim("head_dim");
  check.contiguous("cos_sin", cos_sin, {&max_positions, &head_dim}, {DType::f32});
  check.condition(head_dim > 0 && head_dim % 2 == 0,
                  "cos_sin has head_dim=" + std::to_string(head_dim) + ", expected an even number above 0");
  Dim num_tokens("num_tokens"), num_seqs("num_seqs"), num_offsets("num_seqs + 1"), max_blocks("max_blocks");
  Dim qkv_size("(num_heads + 2 num_kv_heads) * head_dim", (num_heads + 2 * num_kv_heads) * head_dim);
  Dim num_blocks("num_blocks"), layers_per_block("layers_per_block"), two("2", 2),
      kv_heads("num_kv_heads", num_kv_heads);
  Dim block_size("block_size");
  check.tensor("qkv", qkv, {&num_tokens, &qkv_size}, check.floats())
      .contiguous("positions", positions, {&num_tokens}, {DType::i32})
      .contiguous("cache_rows", cache_rows, {&num_tokens}, {DType::i32})
      .contiguous("kv_cache", kv_cache, {&num_blocks, &layers_per_block, &two, &kv_heads, &block_size, &head_dim},
                  {qkv.dtype})
      .contiguous("block_table", block_table, {&num_seqs, &max_blocks}, {DType::i32});
  num_offsets.value = num_seqs + 1;
  check.contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32})
      .range("layer_in_block", layer_in_block, 0, layers_per_block - 1)
      .condition(block_size > 0, "kv_cache has block_size=0, expected at least 1");
  check.condition(num_tokens <= 1 || qkv.strides[0] >= qkv_size, "rows of qkv overlap");
  // An index that the kernel's own writes changed would be used without a check.
  check
      .no_overlap({{"qkv", &qkv}, {"kv_cache", &kv_cache}}, {{"positions", &positions},
                                                             {"cache_rows", &cache_rows},
                                                             {"cos_sin", &cos_sin},
                                                             {"block_table", &block_table},
                                                             {"cu_seqlens", &cu_seqlens}})
      .no_overlap("qkv", qkv, "kv_cache", kv_cache);
  check.condition(q_norm.has_value() == k_norm.has_value(),
                  std::string(q_norm ? "k_norm" : "q_norm") + " is None, expected a weight for queries and for keys");
  for (const auto& [argument, weight] : {std::pair{"q_norm", &q_norm}, {"k_norm", &k_norm}}) {
    if (!*weight) continue;
    check.contiguous(argument, **weight, {&head_dim}, {qkv.dtype})
        .no_overlap({{"qkv", &qkv}, {"kv_cache", &kv_cache}}, {{argument, &**weight}});
  }
  check.condition(eps >= 0, "eps is " + std::to_string(eps) + ", expected at least 0");
  const RopeStoreParams params{.qkv = qkv.data,
                               .kv_cache = kv_cache.data,
                               .positions = positions.as<std::int32_t>(),
                               .cache_rows = cache_rows.as<std::int32_t>(),
                               .cos_sin = cos_sin.as<float>(),
                               .block_table = block_table.as<std::int32_t>(),
                               .cu_seqlens = cu_seqlens.as<std::int32_t>(),
                               .q_norm = as_or_null<void>(q_norm),
                               .k_norm = as_or_null<void>(k_norm),
                               .eps = eps,
                               .num_tokens = num_tokens,
                               .num_seqs = num_seqs,
                               .num_heads = num_heads,
                               .num_kv_heads = num_kv_heads,
                               .head_dim = head_dim,
                               .qkv_stride = qkv.strides[0],
                               .layers_per_block = layers_per_block,
                               .layer_in_block = layer_in_block,
                               .block_size = block_size,
                               .max_blocks = max_blocks,
                               .dtype = qkv.dtype};
  if (check.can_read()) {
    check_padded_offsets(check, "cu_seqlens", params.cu_seqlens, num_seqs, num_tokens);
    check_positions(check, params, max_positions);
    check_cache_rows(check, params, num_blocks);
  }
  run(params, qkv, stream);
}

}  // namespace dpn
