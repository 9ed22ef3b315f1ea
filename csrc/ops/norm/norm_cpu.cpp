#include <cmath>

#include "core/parallel.h"
#include "core/simd.h"
#include "ops/norm/norm.h"

namespace dpn::DPN_ISA {

namespace {

// Normalises one row in three passes over data in the cache. The sum of x and residual is rounded to T before it is
// normalised, so that the result is the same as without fusion of the addition.
template <class T>
const T* add_residual(const T* x, T* residual, std::int64_t size) {
  if (!residual) return x;
  for_each_vector(size,
                  [&](std::int64_t i, int n) { store_n(residual + i, load_n(residual + i, n) + load_n(x + i, n), n); });
  return residual;
}

template <class T>
void rms_norm_rows(const NormParams& p) {
  const auto* weight = static_cast<const T*>(p.weight);
  parallel_rows(p.num_tokens, p.hidden_size * static_cast<std::int64_t>(sizeof(T)) * 3,
                [&](std::int64_t begin, std::int64_t end) {
                  for (std::int64_t row = begin; row < end; ++row) {
                    T* residual = p.residual ? static_cast<T*>(p.residual) + row * p.hidden_size : nullptr;
                    const T* x = add_residual(static_cast<const T*>(p.x) + row * p.x_stride, residual, p.hidden_size);
                    VecF squares{};
                    for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
                      const VecF value = load_n(x + i, n);
                      squares += value * value;
                    });
                    const float scale =
                        1.0f / std::sqrt(reduce_sum(squares) / static_cast<float>(p.hidden_size) + p.eps);
                    T* out = static_cast<T*>(p.out) + row * p.hidden_size;
                    for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
                      store_n(out + i, load_n(x + i, n) * scale * load_n(weight + i, n), n);
                    });
                  }
                });
}

template <class T>
void layer_norm_rows(const NormParams& p) {
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias);
  parallel_rows(
      p.num_tokens, p.hidden_size * static_cast<std::int64_t>(sizeof(T)) * 3,
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          T* residual = p.residual ? static_cast<T*>(p.residual) + row * p.hidden_size : nullptr;
          const T* x = add_residual(static_cast<const T*>(p.x) + row * p.x_stride, residual, p.hidden_size);
          VecF sum{};
          for_each_vector(p.hidden_size, [&](std::int64_t i, int n) { sum += load_n(x + i, n); });
          const float mean = reduce_sum(sum) / static_cast<float>(p.hidden_size);
          // A second pass over centred values. The mean of squares minus the squared mean would lose all digits where a
          // row's mean is far above its spread. There the rounding of the mean matters too; the centred sum corrects
          // it.
          VecF centred_sum{}, squares{};
          for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
            const VecF centred = n == kWidth ? load(x + i) - mean : load_partial(x + i, n) - first_lanes(mean, n);
            centred_sum += centred;
            squares += centred * centred;
          });
          const float correction = reduce_sum(centred_sum) / static_cast<float>(p.hidden_size);
          const float variance = reduce_sum(squares) / static_cast<float>(p.hidden_size) - correction * correction;
          const float scale = 1.0f / std::sqrt(variance + p.eps);
          T* out = static_cast<T*>(p.out) + row * p.hidden_size;
          for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
            store_n(out + i,
                    (load_n(x + i, n) - mean - correction) * scale * load_n(weight + i, n) + load_n(bias + i, n), n);
          });
        }
      });
}

}  // namespace

void rms_norm_kernel(const NormParams& p) { p.dtype == DType::f32 ? rms_norm_rows<float>(p) : rms_norm_rows<bf16>(p); }

void layer_norm_kernel(const NormParams& p) {
  p.dtype == DType::f32 ? layer_norm_rows<float>(p) : layer_norm_rows<bf16>(p);
}

}  // namespace dpn::DPN_ISA
