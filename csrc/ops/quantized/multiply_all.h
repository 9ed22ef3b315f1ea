// Any number of rows of x, quantised, times all weights in one form. Include as simd.h.
#pragma once

#include "ops/quantized/multiply_tiles.h"
#if defined(__AMX_INT8__)
#include "ops/quantized/multiply_amx.h"
#endif

namespace dpn::DPN_ISA {

// Few rows are multiplied in one block, with as wide a tile as the registers allow: memory is the limit then, and a
// core reads eight panels at a time a third faster than two.
template <class Form, class T>
void multiply_all(const QuantizedLinearParams& p) {
  if (p.num_tokens == 0 || p.out_features == 0) return;
  if (p.num_tokens <= kMostRows<8>) return multiply_tiles<Form, T, 8>(p);
  if (p.num_tokens <= kMostRows<4>) return multiply_tiles<Form, T, 4>(p);
  if constexpr (Form::kQuadsPerLine == 1) {  // 4-bit weights are so few bytes that reading them twice is faster
    if (p.num_tokens <= kMostRows<2>) return multiply_tiles<Form, T, 2>(p);
  }
#if defined(__AMX_INT8__)
  if (p.num_tokens > kMostStreamedRows) return multiply_amx<Form, T>(p);
#endif
  multiply_tiles<Form, T, Dot4::kManyRowsVectors>(p);
}

}  // namespace dpn::DPN_ISA
