#include "ops/embedding/embedding.h"

#include "core/check.h"

namespace dpn {

namespace {

void run(const EmbeddingParams& params) { DPN_CALL_CPU_KERNEL(embedding_kernel, params) }

}  // namespace

void embedding(const Tensor& out, const Tensor& table, const OptionalTensor& scale, const Tensor& token_ids) {
  const Checker check("embedding");
  Dim num_tokens("num_tokens"), hidden_size("hidden_size"), vocab_size("vocab_size");
  check.contiguous("token_ids", token_ids, {&num_tokens}, {DType::i64})
      .contiguous("out", out, {&num_tokens, &hidden_size}, {DType::f32, DType::bf16});
  if (scale) {
    check.contiguous("scale", *scale, {&vocab_size}, {DType::f32});
    Dim panels("ceil(vocab_size / 16)", ceil_div(vocab_size, kPanelRows)), rows("rows", kPanelRows);
    Dim quads("ceil(hidden_size / 4)", ceil_div(hidden_size, kTileColumns)), bytes("bytes", kTileColumns);
    check.contiguous("table", table, {&panels, &quads, &rows, &bytes}, {DType::u8})
        .no_overlap("out", out, "scale", *scale);
  } else {
    check.contiguous("table", table, {&vocab_size, &hidden_size}, {out.dtype});
  }
  check.no_overlap({{"out", &out}}, {{"table", &table}, {"token_ids", &token_ids}});
  const auto* ids = token_ids.as<std::int64_t>();
  check.condition(vocab_size > 0 || num_tokens == 0, "table has no rows, expected at least 1");
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    if (ids[t] >= vocab_size) check.range(at("token_ids", t).c_str(), ids[t], 0, vocab_size - 1);
  }
  run({.out = out.data,
       .table = table.data,
       .scale = as_or_null<float>(scale),
       .token_ids = ids,
       .num_tokens = num_tokens,
       .hidden_size = hidden_size,
       .dtype = out.dtype});
}

}  // namespace dpn
