#include "ops/sampling/sample.h"

#include <cmath>

#include "core/aligned_buffer.h"
#include "core/check.h"
#include "ops/sampling/sample_row.h"

namespace dpn {

namespace {

void run(const SampleGreedyParams& params, const Tensor& logits, Stream stream) {
  DPN_CALL_KERNEL(sample_greedy_kernel, params, logits, stream)
}

void run(const SampleParams& params, const Tensor& logits,
         Stream stream){DPN_CALL_KERNEL(sample_kernel, params, logits, stream)}

LogitRows checked_rows(const Checker& check, const Tensor& logits, Dim& num_rows, Dim& vocab_size) {
  check.tensor("logits", logits, {&num_rows, &vocab_size}, check.floats())
      .range("vocab_size", vocab_size, 1, sampling::kMostTokens);
  return {.logits = logits.data,
          .num_rows = num_rows,
          .vocab_size = vocab_size,
          .stride = logits.strides[0],
          .dtype = logits.dtype};
}

// Checks that is_good(entry) is true of every entry of a parameter [num_rows].
template <class T, class IsGood>
void check_parameter(const Checker& check, const char* argument, const Tensor& t, const char* expected,
                     const IsGood& is_good) {
  for (std::int64_t i = 0; i < t.numel(); ++i) {
    const T value = t.as<T>()[i];
    check.condition(is_good(value), std::string(argument) + " has the entry " + std::to_string(value) +
                                        " at flat index " + std::to_string(i) + ", expected " + expected);
  }
}

}  // namespace

void sample_greedy(const Tensor& tokens, const Tensor& logits, Stream stream) {
  const Checker check("sample_greedy", logits);
  Dim num_rows("num_rows"), vocab_size("vocab_size");
  const LogitRows rows = checked_rows(check, logits, num_rows, vocab_size);
  check.contiguous("tokens", tokens, {&num_rows}, {DType::i64}).no_overlap("tokens", tokens, "logits", logits);
  run(SampleGreedyParams{.tokens = tokens.as<std::int64_t>(), .rows = rows}, logits, stream);
}

void sample(const Tensor& tokens, const Tensor& is_finite, const Tensor& logits, const Tensor& depths,
            const Tensor& temperatures, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
            const Tensor& keys, const Tensor& positions, Stream stream) {
  const Checker check("sample", logits);
  Dim num_rows("num_rows"), vocab_size("vocab_size");
  const LogitRows rows = checked_rows(check, logits, num_rows, vocab_size);
  check.contiguous("tokens", tokens, {&num_rows}, {DType::i32})
      .contiguous("is_finite", is_finite, {&num_rows}, {DType::i32})
      .no_overlap("tokens", tokens, "is_finite", is_finite)
      .no_overlap("tokens", tokens, "logits", logits)
      .no_overlap("is_finite", is_finite, "logits", logits)
      .contiguous("depths", depths, {&num_rows, &vocab_size}, {DType::i32})
      .contiguous("temperatures", temperatures, {&num_rows}, {DType::f32})
      .contiguous("top_k", top_k, {&num_rows}, {DType::i32})
      .contiguous("top_p", top_p, {&num_rows}, {DType::f64})
      .contiguous("min_p", min_p, {&num_rows}, {DType::f32})
      .contiguous("keys", keys, {&num_rows}, {DType::i64})
      .contiguous("positions", positions, {&num_rows}, {DType::i64})
      .no_overlap("depths", depths, "logits", logits)
      .no_overlap("depths", depths, "tokens", tokens)
      .no_overlap("depths", depths, "is_finite", is_finite);
  if (check.can_read()) {
    check_parameter<float>(check, "temperatures", temperatures, "0 (greedy) or more",
                           [](float t) { return std::isfinite(t) && t >= 0; });
    check_parameter<std::int32_t>(check, "top_k", top_k, "0 or -1 (off), or at least 1",
                                  [](std::int32_t k) { return k >= -1; });
    check_parameter<double>(check, "top_p", top_p, "above 0 and at most 1", [](double p) { return p > 0 && p <= 1; });
    check_parameter<float>(check, "min_p", min_p, "from 0 to 1", [](float p) { return p >= 0 && p <= 1; });
  }
  const AlignedBuffer masses(check.can_read() ? depths.numel() * 8 : 0);
  run(SampleParams{.tokens = tokens.as<std::int32_t>(),
                   .is_finite = is_finite.as<std::int32_t>(),
                   .rows = rows,
                   .depths = depths.as<std::int32_t>(),
                   .masses = static_cast<std::uint64_t*>(masses.data()),
                   .temperatures = temperatures.as<float>(),
                   .top_k = top_k.as<std::int32_t>(),
                   .top_p = top_p.as<double>(),
                   .min_p = min_p.as<float>(),
                   .keys = keys.as<std::int64_t>(),
                   .positions = positions.as<std::int64_t>()},
      logits, stream);
}

}  // namespace dpn
