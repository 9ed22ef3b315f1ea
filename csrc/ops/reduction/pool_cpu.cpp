#include "core/parallel.h"
#include "core/simd.h"
#include "ops/reduction/pool.h"
#include "ops/reduction/pooled_grid.h"

namespace dpn::DPN_ISA {

namespace {

// An image that is pooled.
template <class T>
struct Image {
  const T* x;          // first visual row
  std::int64_t begin;  // rows [begin, end) of the sequence's output are pooled
  std::int64_t end;
  std::int64_t dropped;  // number of rows that it loses
  Grid grid;
  Grid kernel;
  std::int64_t out_width;
  float scale;
  const T* conv_weight;
};

// x: first row of the sequence. dropped: number of rows that the images before this one lose.
template <class T>
Image<T> image_at(const PoolParams& p, std::int64_t i, const T* x, std::int64_t dropped) {
  const std::int32_t expert = p.experts[i];
  const Grid grid = grid_at(p.images.grids, i), kernel = grid_at(p.kernels, expert);
  const Grid pooled = pooled_grid(grid, kernel);
  const std::int64_t start = p.images.starts[i], begin = start - dropped;
  return {.x = x + start * p.x_stride,
          .begin = begin,
          .end = begin + num_rows(pooled),
          .dropped = num_rows(grid) - num_rows(pooled),
          .grid = grid,
          .kernel = kernel,
          .out_width = pooled.width,
          .scale = p.scales ? p.scales[i] : 1.0f,
          .conv_weight = p.conv_weights ? static_cast<const T*>(p.conv_weights[expert]) : nullptr};
}

// NaN wins, as in torch's max_pool2d.
inline VecF max_or_nan(VecF best, VecF value) { return value > best || value != value ? value : best; }

// The window of row `index` of the pooled image.
template <class T, PoolFunction function>
void pool_row(const PoolParams& p, const Image<T>& image, std::int64_t index, T* out) {
  const Grid kernel = image.kernel;
  const std::int64_t top = index / image.out_width * kernel.height, left = index % image.out_width * kernel.width;
  const T* corner = image.x + (top * image.grid.width + left) * p.x_stride;
  const auto area = static_cast<float>(num_rows(kernel));
  for_each_vector(p.hidden_size, [&](std::int64_t i, int n) {
    VecF value = function == PoolFunction::max ? load_n(corner + i, n) : VecF{};
    for (std::int64_t y = 0; y < kernel.height; ++y) {
      for (std::int64_t x = 0; x < kernel.width; ++x) {
        const VecF element = load_n(corner + (y * image.grid.width + x) * p.x_stride + i, n);
        if constexpr (function == PoolFunction::max) {
          value = max_or_nan(value, element);
        } else if constexpr (function == PoolFunction::avg) {
          value += element;
        } else {
          value += element * load_n(image.conv_weight + (y * kernel.width + x) * p.hidden_size + i, n);
        }
      }
    }
    if constexpr (function == PoolFunction::avg) value /= area;
    store_n(out + i, value * image.scale, n);
  });
}

template <class T>
void copy_rows(const PoolParams& p, const T* x, T* out, std::int64_t count) {
  for (std::int64_t row = 0; row < count; ++row) {
    std::memcpy(out + row * p.hidden_size, x + row * p.x_stride, static_cast<std::size_t>(p.hidden_size) * sizeof(T));
  }
}

// Writes rows [begin, end) of one sequence's output: the images in order, and the copied rows before, between and after
// them.
template <class T, PoolFunction function>
void write_rows(const PoolParams& p, std::int64_t b, std::int64_t begin, std::int64_t end) {
  const T* x = static_cast<const T*>(p.x) + p.cu_seqlens[b] * p.x_stride;
  T* out = static_cast<T*>(p.out) + p.out_cu_seqlens[b] * p.hidden_size;
  std::int64_t row = begin, dropped = 0;  // the next row, and the number of rows that were dropped before it
  const auto copy_to = [&](std::int64_t stop) {
    stop = stop < end ? stop : end;
    if (row >= stop) return;
    copy_rows(p, x + (row + dropped) * p.x_stride, out + row * p.hidden_size, stop - row);
    row = stop;
  };
  for (std::int64_t i = p.images.cu_images[b]; i < p.images.cu_images[b + 1] && row < end; ++i) {
    if (p.experts[i] < 0) continue;
    const Image<T> image = image_at(p, i, x, dropped);
    copy_to(image.begin);
    for (; row < end && row < image.end; ++row) {
      pool_row<T, function>(p, image, row - image.begin, out + row * p.hidden_size);
    }
    dropped += image.dropped;
  }
  copy_to(end);
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
