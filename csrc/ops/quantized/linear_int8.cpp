#include "ops/quantized/linear_int8.h"

#include "core/check.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace dpn {

namespace {

void run(const QuantizedLinearParams& params) {
  const CpuIsa isa = cpu_isa();
  DPN_TRY_amx(isa, linear_int8_kernel, params) DPN_TRY_avx512_vnni(isa, linear_int8_kernel, params)
      DPN_CALL_CPU_KERNEL_OF(isa, linear_int8_kernel, params)
}

}  // namespace

void linear_int8(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation) {
  const Checker check("linear_int8");
  const ActivationKind kind = activation_named(check, activation);
  Dim num_tokens("num_tokens"), in_features("in_features"), out_features("out_features");
  check.tensor("x", x, {&num_tokens, &in_features}, {DType::f32, DType::bf16})
      .range("in_features", in_features, 0, kMostInFeatures)
      .contiguous("scale", scale, {&out_features}, {DType::f32});
  const bool is_gated = kind == ActivationKind::silu_mul;
  if (is_gated) {
    check.condition(out_features % (2 * kPanelRows) == 0,
                    "out_features is " + std::to_string(out_features) + ", expected a multiple of 32 with silu_mul");
  }
  Dim out_columns(is_gated ? "out_features / 2" : "out_features", is_gated ? out_features / 2 : out_features);
  Dim panels("ceil(out_features / 16)", ceil_div(out_features, kPanelRows));
  Dim quads("ceil(in_features / 4)", ceil_div(in_features, 4)), rows("rows", kPanelRows), columns("columns", 4);
  check.contiguous("weight", weight, {&panels, &quads, &rows, &columns}, {DType::u8})
      .contiguous("out", out, {&num_tokens, &out_columns}, {x.dtype})
      .no_overlap({{"out", &out}}, {{"x", &x}, {"weight", &weight}, {"scale", &scale}});
  if (bias) check.contiguous("bias", *bias, {&out_features}, {x.dtype}).no_overlap("out", out, "bias", *bias);
  run({.out = out.data,
       .x = x.data,
       .weight = weight.as<std::uint8_t>(),
       .scale = scale.data,
       .bias = as_or_null<void>(bias),
       .scratch = scratch(quantized_scratch_bytes(num_tokens, in_features, 1, max_threads())),
       .num_tokens = num_tokens,
       .in_features = in_features,
       .out_features = out_features,
       .x_stride = x.strides[0],
       .activation = kind,
       .dtype = x.dtype});
}

}  // namespace dpn
