// x W^T + b with weights and rows of x in 8 bits (W8A8).
#pragma once

#include "core/cpu_isa.h"
#include "ops/quantized/quantized_linear.h"

namespace dpn {

// weight: uint8 [panels, ceil(in_features / 4), 16, 4], element [p, j, n, i] is q + 128 of row 16 p + n, column 4 j +
// i. scale: float32 [out_features].
void linear_int8(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(linear_int8_kernel, QuantizedLinearParams)
