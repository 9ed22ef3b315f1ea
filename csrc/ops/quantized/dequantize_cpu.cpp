#include "core/parallel.h"
#include "ops/activation/activation_simd.h"
#include "ops/quantized/dequantize.h"
#include "ops/quantized/round_simd.h"

namespace dpn::DPN_ISA {

namespace {

inline VecF load_sums(const float* source, int count) { return load_n(source, count); }
inline VecF load_sums(const std::int32_t* source, int count) {
  VecI sums{};
  std::memcpy(&sums, source, static_cast<std::size_t>(count) * sizeof *source);
  return __builtin_convertvector(sums, VecF);
}

template <class Sum, class T>
void run(const DequantizeParams& p) {
  const T* bias = static_cast<const T*>(p.bias);
  parallel_rows(p.num_tokens, p.out_features * 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const Sum* sums = static_cast<const Sum*>(p.sums) + row * p.columns;
      T* out = static_cast<T*>(p.out) + row * p.out_features;
      for_each_vector(p.out_features, [&](std::int64_t n, int count) {
        const VecF scaled = load_sums(sums + n, count) * p.row_scale[row] * load_n(p.scale + n, count);
        store_columns(out + n, activate(scaled + (bias ? load_n(bias + n, count) : VecF{}), p.kind), count);
      });
    }
  });
}

template <class T>
void run_sums(const DequantizeParams& p) {
  p.sums_dtype == DType::i32 ? run<std::int32_t, T>(p) : run<float, T>(p);
}

}  // namespace

void dequantize_kernel(const DequantizeParams& p) { p.dtype == DType::f32 ? run_sums<float>(p) : run_sums<bf16>(p); }

}  // namespace dpn::DPN_ISA
