#pragma once

#include <cmath>
#include <cstdint>

enum __nv_fp8_interpretation_t { __NV_E4M3 };
enum __nv_saturation_t { __NV_SATFINITE };

// The nearest of the 127 numbers from 0 to 448, and of two as near the one with an even code.
inline std::uint8_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t) {
  if (x != x) return 0x7F;
  const float magnitude = std::fabs(x);
  int best = 0;
  float least = magnitude;
  for (int code = 1; code < 127; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    const float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    const float distance = std::fabs(magnitude - value);
    if (distance < least || (distance == least && code % 2 == 0)) {
      best = code;
      least = distance;
    }
  }
  return static_cast<std::uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}
