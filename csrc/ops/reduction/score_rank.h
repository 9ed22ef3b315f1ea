// The order of scores, for the CPU and the GPU. Everything is static, so that code compiled for one instruction set of
// the CPU is never linked into code for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace dpn {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kTopShift = 32 - kDigitBits;  // place of the first digit

// A number that grows with the score. NaN has the smallest, and both zeros have the same.
DPN_DEVICE static inline std::uint32_t rank_of(float score) {
  if (score != score) return 0;
  score += 0.0f;  // -0 becomes 0
  std::uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What is known of the smallest kept rank: its first digits, and how many of the scores with these digits are kept.
// When all digits are known, these scores are ties, and the first ones are kept.
struct Cut {
  std::uint32_t rank;
  std::int32_t count;
};

// Whether the rank has the cut's digits before the one at `shift`.
DPN_DEVICE static inline bool has_digits(std::uint32_t rank, const Cut& cut, int shift) {
  return shift == kTopShift || (rank ^ cut.rank) >> (shift + kDigitBits) == 0;
}

DPN_DEVICE static inline int digit_of(std::uint32_t rank, int shift) {
  return static_cast<int>(rank >> shift & (kDigits - 1));
}

}  // namespace dpn
