#include "ops/attention/checks.h"

namespace dpn {

void check_heads(const Checker& check, std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                 float scale) {
  check.range("num_kv_heads", num_kv_heads, 1, INT32_MAX)
      .condition(num_heads > 0 && num_heads % num_kv_heads == 0,
                 "num_heads is " + std::to_string(num_heads) +
                     ", expected a multiple of num_kv_heads=" + std::to_string(num_kv_heads))
      .condition(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= kMaxHeadDim,
                 "head_dim is " + std::to_string(head_dim) + ", expected a multiple of 8 from 8 to " +
                     std::to_string(kMaxHeadDim))
      .condition(scale > 0 && scale < 1e30f,
                 "scale is " + std::to_string(scale) + ", expected a positive finite number");
}

void check_blocks(const Checker& check, const Tensor& block_table, const char* argument, const Tensor& lengths,
                  std::int64_t least, std::int64_t num_blocks, std::int64_t block_size) {
  const std::int64_t max_blocks = block_table.shape[1];
  check_entries(check, argument, lengths.as<std::int32_t>(), lengths.shape[0], least, max_blocks * block_size);
  for (std::int64_t s = 0; s < block_table.shape[0]; ++s) {
    const auto* blocks = block_table.as<std::int32_t>() + s * max_blocks;
    const std::int64_t used = (lengths.as<std::int32_t>()[s] + block_size - 1) / block_size;
    for (std::int64_t i = 0; i < used; ++i) {
      if (blocks[i] < 0 || blocks[i] >= num_blocks) {
        check.fail("block_table[" + std::to_string(s) + ", " + std::to_string(i) + "] is " + std::to_string(blocks[i]) +
                   ", expected 0 to " + std::to_string(num_blocks - 1) + " (num_blocks=" + std::to_string(num_blocks) +
                   ")");
      }
    }
  }
}

const std::int32_t* first_keys_of(const Checker& check, const OptionalTensor& first_keys, Dim& num_rows,
                                  const Tensor& out) {
  if (!first_keys) return nullptr;
  check.contiguous("first_keys", *first_keys, {&num_rows}, {DType::i32})
      .no_overlap("out", out, "first_keys", *first_keys);
  return first_keys->as<std::int32_t>();
}

void check_first_keys(const Checker& check, const std::int32_t* first_keys, const std::int32_t* cu_seqlens,
                      const std::int32_t* context_lens, std::int64_t num_seqs) {
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    std::int32_t low = 0, own = context_lens[s] - (cu_seqlens[s + 1] - cu_seqlens[s]);
    for (std::int64_t t = cu_seqlens[s]; t < cu_seqlens[s + 1]; ++t, ++own) {
      if (first_keys[t] < low || first_keys[t] > own) {
        check.fail(at("first_keys", t) + " is " + std::to_string(first_keys[t]) + ", expected " + std::to_string(low) +
                   " to " + std::to_string(own) + ": at least that of the row before, and at most the row's own key");
      }
      low = first_keys[t];
    }
  }
}

void check_addresses(const Checker& check, const char* argument, const Tensor& t) {
  if (t.device != Device::cuda) return;
  bool ok = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i + 1 < t.ndim; ++i) ok = ok && (t.shape[i] <= 1 || t.strides[i] % 8 == 0);
  check.condition(
      ok, std::string(argument) + " is not aligned, expected rows and heads that start at multiples of 16 bytes");
  constexpr std::int64_t kWidestRow = std::int64_t{1} << 30;
  check.condition(t.shape[0] <= 1 || t.strides[0] < kWidestRow,
                  std::string(argument) + " has rows " + std::to_string(t.strides[0]) +
                      " elements apart, expected less than " + std::to_string(kWidestRow));
}

PagedKeys paged_keys(const Tensor& kv_cache, const Tensor& block_table, std::int64_t layer_in_block) {
  const std::int64_t block_size = kv_cache.shape[4];
  return {.kv_cache = kv_cache.data,
          .block_table = block_table.as<std::int32_t>(),
          .max_blocks = block_table.shape[1],
          .block_size = block_size,
          .layers_per_block = kv_cache.shape[1],
          .layer_in_block = layer_in_block,
          .block_divisor = Divisor::of(block_size)};
}

}  // namespace dpn
