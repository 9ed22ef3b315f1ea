// Activations on vectors of floats. Include only from *_cpu.cpp files, as core/simd.h.
#pragma once

#include "core/simd.h"
#include "ops/activation/activation.h"

namespace dpn::DPN_ISA {

inline VecF at_least(VecF x, float low) { return x < low ? broadcast(low) : x; }  // NaN stays NaN
inline VecF at_most(VecF x, float high) { return x > high ? broadcast(high) : x; }

// x / (1 + e^(-slope x)). For x below the clamp the true magnitude is below 1e-33; the clamp keeps -infinity from
// becoming infinity * 0.
inline VecF sigmoid_linear(VecF x, float slope) {
  const VecF clamped = at_least(x, -80.0f / slope);
  return clamped * reciprocal(1.0f + exp(-slope * clamped));
}

inline VecF silu(VecF x) { return sigmoid_linear(x, 1.0f); }
inline VecF quick_gelu(VecF x) { return sigmoid_linear(x, 1.702f); }

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, without cancellation. For x below the clamp the true magnitude is
// below 1e-31.
inline VecF gelu_tanh(VecF x) {
  const VecF clamped = at_least(x, -9.5f);
  return clamped * reciprocal(1.0f + exp(clamped * (clamped * clamped * -0.07135481282553577f + -1.5957691216057308f)));
}

// x Phi(x), where Phi is the normal distribution function, computed as max(x, 0) - |x| Phi(-|x|): without cancellation.
// Phi(-a) = e^(-a^2 / 2) t P(t) with t = 1 / (1 + 0.3 a / sqrt(2)); P is the minimax polynomial of degree 8 of
// erfcx(a / sqrt(2)) / (2 t) for a <= 14, fitted with mpmath's chebyfit, error 2e-8. Absolute error of the whole below
// 3e-7.
inline VecF gelu(VecF x) {
  const VecF magnitude = at_most(x < 0.0f ? -x : x, 20.0f);
  const VecF t = reciprocal(1.0f + magnitude * 0.21213203435596426f);
  VecF p = broadcast(-0.06538543863426784f);
  p = p * t + 0.24596713527857597f;
  p = p * t - 0.2630758314121461f;
  p = p * t + 0.28225712107551154f;
  p = p * t - 0.05349168123871259f;
  p = p * t + 0.1102695845526511f;
  p = p * t + 0.07339801109312165f;
  p = p * t + 0.08547455997404363f;
  p = p * t + 0.08458652882580843f;
  const VecF tail = exp(magnitude * magnitude * -0.5f) * (p * t);
  return max(x, VecF{}) - magnitude * tail;
}

// Of one number each.
inline VecF activate(VecF x, ActivationKind kind) {
  switch (kind) {
    case ActivationKind::quick_gelu:
      return quick_gelu(x);
    case ActivationKind::gelu:
      return gelu(x);
    case ActivationKind::gelu_tanh:
      return gelu_tanh(x);
    default:
      return x;
  }
}

}  // namespace dpn::DPN_ISA
