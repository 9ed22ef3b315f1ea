#include "ops/linear/linear.h"

#include "core/aligned_buffer.h"
#include "core/check.h"

namespace dpn {

namespace {

void run(const LinearParams& params) { DPN_CALL_CPU_KERNEL_OF(cpu_isa(TunedOp::linear), linear_kernel, params) }

}  // namespace

void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Checker check("linear");
  Dim num_tokens("num_tokens"), in_features("in_features"), out_features("out_features");
  check.tensor("x", x, {&num_tokens, &in_features}, {DType::f32, DType::bf16})
      .contiguous("weight", weight, {&out_features, &in_features}, {x.dtype})
      .contiguous("out", out, {&num_tokens, &out_features}, {x.dtype})
      .no_overlap("out", out, "x", x)
      .no_overlap("out", out, "weight", weight);
  if (bias) check.contiguous("bias", *bias, {&out_features}, {x.dtype}).no_overlap("out", out, "bias", *bias);
  const AlignedBuffer packed_x(linear_scratch_bytes(num_tokens, in_features));
  run({.out = out.data,
       .x = x.data,
       .weight = weight.data,
       .bias = as_or_null<void>(bias),
       .packed_x = packed_x.data(),
       .num_tokens = num_tokens,
       .in_features = in_features,
       .out_features = out_features,
       .x_stride = x.strides[0],
       .dtype = x.dtype});
}

}  // namespace dpn
