#include "core/parallel.h"
#include "ops/activation/activation.h"
#include "ops/activation/activation_simd.h"

namespace dpn::DPN_ISA {

namespace {

// x has `parts` times as many elements as out.
template <class T, class Function>
void for_each_row(const ActivationParams& p, std::int64_t parts, const Function& function) {
  const std::int64_t row_bytes = (parts + 1) * p.size * static_cast<std::int64_t>(sizeof(T));
  parallel_rows(p.num_tokens, row_bytes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* out = static_cast<T*>(p.out) + row * p.out_stride;
      for_each_vector(p.size, [&](std::int64_t i, int n) { store_n(out + i, function(x + i, n), n); });
    }
  });
}

template <class T>
void run(const ActivationParams& p) {
  switch (p.kind) {
    case ActivationKind::silu_mul:
      return for_each_row<T>(p, 2,
                             [&](const T* gate, int n) { return silu(load_n(gate, n)) * load_n(gate + p.size, n); });
    case ActivationKind::quick_gelu:
      return for_each_row<T>(p, 1, [](const T* x, int n) { return quick_gelu(load_n(x, n)); });
    case ActivationKind::gelu:
      return for_each_row<T>(p, 1, [](const T* x, int n) { return gelu(load_n(x, n)); });
    case ActivationKind::gelu_tanh:
      return for_each_row<T>(p, 1, [](const T* x, int n) { return gelu_tanh(load_n(x, n)); });
    case ActivationKind::none:
      return;
  }
}

}  // namespace

void activation_kernel(const ActivationParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
