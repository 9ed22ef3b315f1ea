#include "ops/quantized/linear_int4.h"

#include "core/check.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace dpn {

namespace {

void run(const QuantizedLinearParams& params) {
  const CpuIsa isa = cpu_isa();
  DPN_TRY_amx(isa, linear_int4_kernel, params) DPN_TRY_avx512_vnni(isa, linear_int4_kernel, params)
      DPN_CALL_CPU_KERNEL_OF(isa, linear_int4_kernel, params)
}

}  // namespace

void linear_int4(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation) {
  const Checker check("linear_int4");
  const ActivationKind kind = activation_named(check, activation);
  const bool is_gated = kind == ActivationKind::silu_mul;
  Dim num_tokens("num_tokens"), in_features("in_features"), out_features("out_features");
  Dim out_columns(is_gated ? "out_features / 2" : "out_features");
  check.tensor("x", x, {&num_tokens, &in_features}, {DType::f32, DType::bf16})
      .range("in_features", in_features, 0, kMostInFeatures)
      .contiguous("out", out, {&num_tokens, &out_columns}, {x.dtype});
  if (is_gated) {
    check.condition(out_columns % kPanelRows == 0,
                    "out has " + std::to_string(out_columns) + " columns, expected a multiple of 16 with silu_mul");
  }
  out_features.value = is_gated ? 2 * out_columns : std::int64_t{out_columns};
  Dim panels("ceil(out_features / 16)", ceil_div(out_features, kPanelRows)), rows("rows", kPanelRows);
  Dim lines("ceil(in_features / 8)", ceil_div(in_features, 8)), bytes("bytes", 4);
  Dim groups("ceil(in_features / 128)", ceil_div(in_features, kInt4Group));
  check.contiguous("weight", weight, {&panels, &lines, &rows, &bytes}, {DType::u8})
      .contiguous("scale", scale, {&panels, &groups, &rows}, {DType::bf16})
      .no_overlap({{"out", &out}}, {{"x", &x}, {"weight", &weight}, {"scale", &scale}});
  if (bias) check.contiguous("bias", *bias, {&out_features}, {x.dtype}).no_overlap("out", out, "bias", *bias);
  run({.out = out.data,
       .x = x.data,
       .weight = weight.as<std::uint8_t>(),
       .scale = scale.data,
       .bias = as_or_null<void>(bias),
       .scratch = scratch(quantized_scratch_bytes(num_tokens, in_features, groups, max_threads())),
       .num_tokens = num_tokens,
       .in_features = in_features,
       .out_features = out_features,
       .x_stride = x.strides[0],
       .activation = kind,
       .dtype = x.dtype});
}

}  // namespace dpn
