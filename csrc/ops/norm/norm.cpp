#include "ops/norm/norm.h"

#include "core/check.h"

namespace dpn {

namespace {

NormParams checked_params(const char* kernel, const Tensor& out, const Tensor& x, const Tensor* residual,
                          const Tensor& weight, const Tensor* bias, float eps) {
  const Checker check(kernel, x);
  Dim num_tokens("num_tokens"), hidden_size("hidden_size");
  check.tensor("x", x, {&num_tokens, &hidden_size}, check.floats())
      .contiguous("weight", weight, {&hidden_size}, {x.dtype})
      .contiguous("out", out, {&num_tokens, &hidden_size}, {x.dtype});
  if (bias) check.contiguous("bias", *bias, {&hidden_size}, {x.dtype});
  if (residual) {
    check.contiguous("residual", *residual, {&num_tokens, &hidden_size}, {x.dtype})
        .no_overlap("residual", *residual, "x", x)
        .no_overlap("residual", *residual, "out", out);
  }
  check.condition(eps >= 0, "eps is " + std::to_string(eps) + ", expected at least 0");
  check.condition(out.data == x.data ? x.strides[0] == hidden_size || num_tokens <= 1 : true,
                  "out is x, which is not contiguous");
  return {.out = out.data,
          .x = x.data,
          .residual = residual ? residual->data : nullptr,
          .weight = weight.data,
          .bias = bias ? bias->data : nullptr,
          .num_tokens = num_tokens,
          .hidden_size = hidden_size,
          .x_stride = x.strides[0],
          .eps = eps,
          .dtype = x.dtype};
}

void run_rms_norm(const NormParams& params, const Tensor& x, Stream stream) {
  DPN_CALL_KERNEL(rms_norm_kernel, params, x, stream)
}
void run_layer_norm(const NormParams& params, const Tensor& x, Stream stream) {
  DPN_CALL_KERNEL(layer_norm_kernel, params, x, stream)
}

}  // namespace

void rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps, Stream stream) {
  run_rms_norm(checked_params("rms_norm", out, x, nullptr, weight, nullptr, eps), x, stream);
}

void add_rms_norm(const Tensor& out, const Tensor& x, const Tensor& residual, const Tensor& weight, float eps,
                  Stream stream) {
  run_rms_norm(checked_params("add_rms_norm", out, x, &residual, weight, nullptr, eps), x, stream);
}

void layer_norm(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& bias, float eps,
                Stream stream) {
  run_layer_norm(checked_params("layer_norm", out, x, nullptr, weight, &bias, eps), x, stream);
}

void add_layer_norm(const Tensor& out, const Tensor& x, const Tensor& residual, const Tensor& weight,
                    const Tensor& bias, float eps, Stream stream) {
  run_layer_norm(checked_params("add_layer_norm", out, x, &residual, weight, &bias, eps), x, stream);
}

}  // namespace dpn
