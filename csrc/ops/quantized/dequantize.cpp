#include "ops/quantized/dequantize.h"

#include "core/check.h"

namespace dpn {

void dequantize(const Tensor& out, const Tensor& sums, const Tensor& row_scale, const Tensor& scale,
                const OptionalTensor& bias, const std::optional<std::string>& kind, Stream stream) {
  const Checker check("dequantize", sums);
  Dim num_rows("num_rows"), columns("columns"), num_tokens("num_tokens"), out_features("out_features");
  check.contiguous("sums", sums, {&num_rows, &columns}, {DType::i32, DType::f32})
      .contiguous("row_scale", row_scale, {&num_tokens}, {DType::f32})
      .contiguous("scale", scale, {&out_features}, {DType::f32})
      .contiguous("out", out, {&num_tokens, &out_features}, check.floats())
      .condition(num_rows >= num_tokens && columns >= out_features,
                 "sums has shape [" + std::to_string(num_rows) + ", " + std::to_string(columns) +
                     "], expected at least [num_tokens=" + std::to_string(num_tokens) +
                     ", out_features=" + std::to_string(out_features) + "]")
      .no_overlap({{"out", &out}}, {{"sums", &sums}, {"row_scale", &row_scale}, {"scale", &scale}});
  if (bias) check.contiguous("bias", *bias, {&out_features}, {out.dtype}).no_overlap("out", out, "bias", *bias);
  const DequantizeParams params{.out = out.data,
                                .sums = sums.data,
                                .row_scale = row_scale.as<float>(),
                                .scale = scale.as<float>(),
                                .bias = as_or_null<void>(bias),
                                .num_tokens = num_tokens,
                                .out_features = out_features,
                                .columns = columns,
                                .kind = kind ? kind_named(check, *kind) : ActivationKind::none,
                                .sums_dtype = sums.dtype,
                                .dtype = out.dtype};
  DPN_CALL_KERNEL(dequantize_kernel, params, sums, stream)
}

}  // namespace dpn
