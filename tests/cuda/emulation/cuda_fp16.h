#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}

inline __half __float2half_rn(float x) {
  const auto value = static_cast<_Float16>(x);
  __half result;
  std::memcpy(&result.bits, &value, 2);
  return result;
}
