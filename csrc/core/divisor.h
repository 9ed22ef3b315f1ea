// Division by a number that does not change, done by a multiplication: an integer division takes about twenty
// instructions on a GPU.
#pragma once

#include <bit>
#include <cstdint>

#include "core/host_device.h"

namespace dpn {

// A number from 1 to 2^31 - 1.
struct Divisor {
  std::uint32_t multiplier;
  std::uint32_t shift;

  static Divisor of(std::int64_t value) {
    // With 2^s >= value, m = floor(2^(31 + s) / value) + 1 exceeds the quotient so little that floor(n m / 2^(31 + s))
    // is right for all n < 2^31 (Granlund and Montgomery, 1994, theorem 4.2).
    const auto shift = static_cast<std::uint32_t>(std::bit_width(static_cast<std::uint64_t>(value) - 1));
    const std::uint64_t power = std::uint64_t{1} << (31 + shift);
    return {static_cast<std::uint32_t>(power / static_cast<std::uint64_t>(value) + 1), 31 + shift};
  }

  // number / value, for a number from 0 to 2^31 - 1.
  DPN_HOST_DEVICE std::int32_t divide(std::int32_t number) const {
    return static_cast<std::int32_t>(static_cast<std::uint64_t>(number) * multiplier >> shift);
  }
};

}  // namespace dpn
