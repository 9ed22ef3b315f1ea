// The exact GELU, for vision towers and routers.
#pragma once

namespace dpn::cuda {

// x Phi(x), where Phi is the normal distribution function, computed as max(x, 0) - |x| Phi(-|x|): without cancellation.
// The clamp keeps infinity from becoming infinity * 0; NaN stays NaN.
__device__ inline float gelu(float x) {
  const float magnitude = fabsf(x) > 20.0f ? 20.0f : fabsf(x);
  const float tail = 0.5f * erfcf(magnitude * 0.70710678118654752f);
  return (x > 0.0f ? x : 0.0f) - magnitude * tail;
}

}  // namespace dpn::cuda
