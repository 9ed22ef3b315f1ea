// x W^T + b with weights in 4 bits, a scale for 128 columns of a row, and rows of x in 8 bits (W4A8).
#pragma once

#include "core/cpu_isa.h"
#include "ops/quantized/quantized_linear.h"

namespace dpn {

constexpr std::int64_t kInt4Group = 128;

// weight: uint8 [panels, ceil(in_features / 8), 16, 4]. Byte [p, j, n, i] has, of row 16 p + n, column 8 j + i in its
// low bits and column 8 j + 4 + i in its high bits, as q + 8. scale: bfloat16 [panels, ceil(in_features / 128), 16].
void linear_int4(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(linear_int4_kernel, QuantizedLinearParams)
