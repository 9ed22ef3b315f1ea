// Transposes lanes of vectors. Include as simd.h.
#pragma once

#include "core/simd.h"

namespace dpn::DPN_ISA {

// A step of transpose: exchanges lanes kStep apart of vectors kStep apart.
template <int kStep, int kSide, class Vec>
inline void exchange_lanes(Vec (&rows)[kSide]) {
  VecI low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i & kStep ? i - kStep + kWidth : i;
    high[i] = low[i] + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if (i & kStep) continue;
    const Vec a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// The lanes of each vector are blocks of kSide: lane j of a block of vector i becomes lane i of the same block of
// vector j. kSide is a power of two, and at most kWidth.
template <int kSide, class Vec>
inline void transpose(Vec (&rows)[kSide]) {
  if constexpr (kSide > 8) exchange_lanes<8>(rows);
  if constexpr (kSide > 4) exchange_lanes<4>(rows);
  if constexpr (kSide > 2) exchange_lanes<2>(rows);
  if constexpr (kSide > 1) exchange_lanes<1>(rows);
}

}  // namespace dpn::DPN_ISA
