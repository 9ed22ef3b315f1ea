#include "ops/sample.h"

#include "core/check.h"

namespace dpn {

void sample_greedy(const Tensor& tokens, const Tensor& is_finite, const Tensor& logits, Stream stream) {
  const Checker check("sample_greedy", logits);
  check.on_cuda("logits", logits);
  Dim num_rows("num_rows"), vocab_size("vocab_size");
  check.tensor("logits", logits, {&num_rows, &vocab_size}, check.floats())
      .contiguous("tokens", tokens, {&num_rows}, {DType::i32})
      .contiguous("is_finite", is_finite, {&num_rows}, {DType::i32})
      .no_overlap("tokens", tokens, "is_finite", is_finite)
      .no_overlap("tokens", tokens, "logits", logits)
      .no_overlap("is_finite", is_finite, "logits", logits)
      .range("vocab_size", vocab_size, 1, INT32_MAX);
  const SampleParams params{.tokens = tokens.as<std::int32_t>(),
                            .is_finite = is_finite.as<std::int32_t>(),
                            .logits = logits.data,
                            .num_rows = num_rows,
                            .vocab_size = vocab_size,
                            .logits_stride = logits.strides[0],
                            .dtype = logits.dtype};
  DPN_CALL_CUDA_KERNEL(sample_greedy_kernel, params, logits, stream)
}

}  // namespace dpn
