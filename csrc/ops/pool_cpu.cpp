#include "core/parallel.h"
#include "core/simd.h"
#include "ops/pool.h"

namespace dpn::DPN_ISA {

namespace {

// One sequence: where its rows are and what becomes of them.
template <class T>
struct Sample {
  const T* x;                 // first row
  std::int64_t visual_begin;  // rows [visual_begin, visual_end) of the output are pooled, the others copied
  std::int64_t visual_end;
  std::int64_t dropped;  // rows that an output row behind the image has moved up by
  std::int64_t end;      // rows of the output; behind them there is room, which is zeroed
  std::int64_t width;
  std::int64_t out_width;
  std::int64_t kernel_height;
  std::int64_t kernel_width;
  float scale;
  const T* conv_weight;
};

template <class T>
Sample<T> sample_of(const PoolParams& p, std::int64_t b) {
  Sample<T> s{};
  s.x = static_cast<const T*>(p.x) + p.cu_seqlens[b] * p.x_stride;
  const std::int32_t expert = p.experts[b];
  s.end = p.lengths ? p.lengths[b] : p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  if (expert < 0) return s;
  const std::int64_t height = p.grids[2 * b];
  s.width = p.grids[2 * b + 1];
  s.kernel_height = p.kernels[2 * expert];
  s.kernel_width = p.kernels[2 * expert + 1];
  s.out_width = s.width / s.kernel_width;
  s.visual_begin = p.image_start[b];
  s.visual_end = s.visual_begin + height / s.kernel_height * s.out_width;
  s.dropped = s.visual_begin + height * s.width - s.visual_end;
  s.end -= s.dropped;
  s.scale = p.scales ? p.scales[b] : 1.0f;
  s.conv_weight = p.conv_weights ? static_cast<const T*>(p.conv_weights[expert]) : nullptr;
  return s;
}

// NaN wins, as in torch's max_pool2d.
inline VecF max_or_nan(VecF best, VecF value) { return value > best || value != value ? value : best; }

template <class T, PoolFunction function>
void pool_row(const PoolParams& p, const Sample<T>& s, const T* corner, T* out) {
  const auto area = static_cast<float>(s.kernel_height * s.kernel_width);
  for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
    VecF value = function == PoolFunction::max ? load_n(corner + i, n) : VecF{};
    for (std::int64_t y = 0; y < s.kernel_height; ++y) {
      for (std::int64_t x = 0; x < s.kernel_width; ++x) {
        const VecF element = load_n(corner + (y * s.width + x) * p.x_stride + i, n);
        if constexpr (function == PoolFunction::max) {
          value = max_or_nan(value, element);
        } else if constexpr (function == PoolFunction::avg) {
          value += element;
        } else {
          value += element * load_n(s.conv_weight + (y * s.kernel_width + x) * p.hidden_size + i, n);
        }
      }
    }
    if constexpr (function == PoolFunction::avg) value /= area;
    store_n(out + i, value * s.scale, n);
  });
}

template <class T>
void copy_rows(const PoolParams& p, const T* x, T* out, std::int64_t count) {
  for (std::int64_t row = 0; row < count; ++row) {
    std::memcpy(out + row * p.hidden_size, x + row * p.x_stride, static_cast<std::size_t>(p.hidden_size) * sizeof(T));
  }
}

// Rows [begin, end) of one sequence's output.
template <class T, PoolFunction function>
void write_rows(const PoolParams& p, std::int64_t b, std::int64_t begin, std::int64_t end) {
  const Sample<T> s = sample_of<T>(p, b);
  T* out = static_cast<T*>(p.out) + p.out_cu_seqlens[b] * p.hidden_size;
  const auto limit = [&](std::int64_t row) { return row < begin ? begin : row > end ? end : row; };
  const std::int64_t visual_begin = limit(s.visual_begin), visual_end = limit(s.visual_end), held = limit(s.end);
  copy_rows(p, s.x + begin * p.x_stride, out + begin * p.hidden_size, visual_begin - begin);
  for (std::int64_t row = visual_begin; row < visual_end; ++row) {
    const std::int64_t index = row - s.visual_begin;
    const std::int64_t y = index / s.out_width * s.kernel_height, x = index % s.out_width * s.kernel_width;
    pool_row<T, function>(p, s, s.x + (s.visual_begin + y * s.width + x) * p.x_stride, out + row * p.hidden_size);
  }
  copy_rows(p, s.x + (visual_end + s.dropped) * p.x_stride, out + visual_end * p.hidden_size, held - visual_end);
  std::memset(out + held * p.hidden_size, 0, static_cast<std::size_t>((end - held) * p.hidden_size) * sizeof(T));
}

template <class T, PoolFunction function>
void run(const PoolParams& p) {
  if (p.num_out_tokens == 0) return;
  const std::int64_t row_bytes =
      (p.num_tokens + p.num_out_tokens) / p.num_out_tokens * p.hidden_size * static_cast<std::int64_t>(sizeof(T));
  parallel_rows(p.num_out_tokens, row_bytes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = 0; begin < end; ++b) {
      const std::int64_t first = p.out_cu_seqlens[b], last = p.out_cu_seqlens[b + 1];
      if (last <= begin) continue;
      const std::int64_t stop = last < end ? last : end;
      write_rows<T, function>(p, b, begin - first, stop - first);
      begin = stop;
    }
  });
}

template <class T>
void run(const PoolParams& p) {
  switch (p.function) {
    case PoolFunction::max:
      return run<T, PoolFunction::max>(p);
    case PoolFunction::avg:
      return run<T, PoolFunction::avg>(p);
    case PoolFunction::conv:
      return run<T, PoolFunction::conv>(p);
  }
}

}  // namespace

void pool_kernel(const PoolParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
