#include "ops/activation/activation.h"

namespace dpn {

namespace {

void run(const ActivationParams& params, const Tensor& x, Stream stream) {
  DPN_CALL_KERNEL(activation_kernel, params, x, stream)
}

// `out` may be `x` itself: every element is read before it is written at the same place.
void check_aliasing(const Checker& check, const Tensor& out, const char* x_name, const Tensor& x) {
  check.condition(out.shape[0] <= 1 || out.strides[0] >= out.shape[1], "rows of out overlap");
  const bool in_place = out.data == x.data && (out.strides[0] == x.strides[0] || out.shape[0] <= 1);
  if (!in_place) check.no_overlap("out", out, x_name, x);
}

ActivationKind gelu_named(const Checker& check, const std::string& argument, const std::string& kind,
                          const std::string& expected) {
  if (kind == "quick_gelu") return ActivationKind::quick_gelu;
  if (kind == "gelu") return ActivationKind::gelu;
  check.condition(kind == "gelu_tanh", argument + " is " + quoted(kind) + ", expected " + expected);
  return ActivationKind::gelu_tanh;
}

}  // namespace

ActivationKind kind_named(const Checker& check, const std::string& kind) {
  return gelu_named(check, "kind", kind, "'quick_gelu', 'gelu' or 'gelu_tanh'");
}

ActivationKind activation_named(const Checker& check, const std::optional<std::string>& activation) {
  if (!activation) return ActivationKind::none;
  if (*activation == "silu_mul") return ActivationKind::silu_mul;
  return gelu_named(check, "activation", *activation, "'silu_mul', 'quick_gelu', 'gelu', 'gelu_tanh' or None");
}

void silu_mul(const Tensor& out, const Tensor& gate_up, Stream stream) {
  const Checker check("silu_mul", gate_up);
  Dim num_tokens("num_tokens"), two_sizes("2 * intermediate_size"), size("intermediate_size");
  check.tensor("gate_up", gate_up, {&num_tokens, &two_sizes}, check.floats());
  check.condition(two_sizes % 2 == 0,
                  "gate_up has " + std::to_string(two_sizes) + " columns, expected gate and up of equal size");
  size.value = two_sizes / 2;
  check.tensor("out", out, {&num_tokens, &size}, {gate_up.dtype});
  check_aliasing(check, out, "gate_up", gate_up);
  run({.out = out.data,
       .x = gate_up.data,
       .num_tokens = num_tokens,
       .size = size,
       .x_stride = gate_up.strides[0],
       .out_stride = out.strides[0],
       .kind = ActivationKind::silu_mul,
       .dtype = gate_up.dtype},
      gate_up, stream);
}

void activation(const Tensor& out, const Tensor& x, const std::string& kind, Stream stream) {
  const Checker check("activation", x);
  Dim num_tokens("num_tokens"), size("intermediate_size");
  check.tensor("x", x, {&num_tokens, &size}, check.floats()).tensor("out", out, {&num_tokens, &size}, {x.dtype});
  check_aliasing(check, out, "x", x);
  run({.out = out.data,
       .x = x.data,
       .num_tokens = num_tokens,
       .size = size,
       .x_stride = x.strides[0],
       .out_stride = out.strides[0],
       .kind = kind_named(check, kind),
       .dtype = x.dtype},
      x, stream);
}

}  // namespace dpn
