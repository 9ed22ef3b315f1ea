#include "ops/quantized/quantize.h"

#include "core/check.h"

namespace dpn {

void quantize(const Tensor& out, const Tensor& scale, const Tensor& x, Stream stream) {
  const Checker check("quantize", x);
  Dim num_tokens("num_tokens"), in_features("in_features"), num_rows("num_rows"), columns("columns");
  check.tensor("x", x, {&num_tokens, &in_features}, check.floats())
      .contiguous("out", out, {&num_rows, &columns}, {DType::i8, DType::f8e4m3})
      .contiguous("scale", scale, {&num_tokens}, {DType::f32})
      .condition(num_rows >= num_tokens && columns >= in_features,
                 "out has shape [" + std::to_string(num_rows) + ", " + std::to_string(columns) +
                     "], expected at least [num_tokens=" + std::to_string(num_tokens) +
                     ", in_features=" + std::to_string(in_features) + "]")
      .no_overlap({{"out", &out}, {"scale", &scale}}, {{"x", &x}})
      .no_overlap("out", out, "scale", scale);
  const QuantizeParams params{.out = out.as<std::uint8_t>(),
                              .scale = scale.as<float>(),
                              .x = x.data,
                              .num_rows = num_rows,
                              .columns = columns,
                              .num_tokens = num_tokens,
                              .in_features = in_features,
                              .x_stride = x.strides[0],
                              .dtype = x.dtype,
                              .out_dtype = out.dtype};
  DPN_CALL_KERNEL(quantize_kernel, params, x, stream)
}

}  // namespace dpn
