#include "core/parallel.h"
#include "ops/quantized/round_simd.h"

namespace dpn::DPN_ISA {

namespace {

template <class T, class Round>
void quantize_row(const QuantizeParams& p, std::int64_t token, float largest, const Round& round) {
  using Bytes = std::uint8_t __attribute__((vector_size(kWidth)));
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  std::uint8_t* out = p.out + token * p.columns;
  const float scale = largest_magnitude(x, p.in_features) / largest;
  const bool is_finite = scale - scale == 0.0f, is_zero = !is_finite || scale == 0.0f;
  const Divider divider(is_zero ? 1.0f : scale);
  p.scale[token] = is_finite ? scale : __builtin_nanf("");
  for_each_vector(p.columns, [&](std::int64_t i, int count) {
    const std::int64_t left = p.in_features - i;
    const int given = left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
    const VecI rounded = is_zero ? VecI{} : round(load_n(x + i, given), divider);
    const Bytes bytes = __builtin_convertvector(rounded, Bytes);
    std::memcpy(out + i, &bytes, static_cast<std::size_t>(count));
  });
}

template <class T>
void run(const QuantizeParams& p) {
  parallel_rows(p.num_rows, p.columns * 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (row >= p.num_tokens) {
        std::memset(p.out + row * p.columns, 0, static_cast<std::size_t>(p.columns));
      } else if (p.out_dtype == DType::i8) {
        quantize_row<T>(p, row, kInt8Steps, to_integers);
      } else {
        quantize_row<T>(p, row, kE4m3Largest, to_e4m3);
      }
    }
  });
}

}  // namespace

void quantize_kernel(const QuantizeParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
