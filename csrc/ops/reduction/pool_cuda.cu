#include "core/cuda_launch.cuh"
#include "core/cuda_sequences.cuh"
#include "core/cuda_vector.cuh"
#include "ops/reduction/pool.h"
#include "ops/reduction/pooled_grid.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // least blocks per multiprocessor; without this ptxas aims at more blocks and spills
constexpr int kMostConvExperts = 16;

// Passed by value, so that a launch does not refer to host memory.
struct ConvWeights {
  const void* weights[kMostConvExperts];  // [kernel height * kernel width, hidden_size] each
};

// The source of an output row.
struct Window {
  std::int64_t corner;  // row of x
  int width;            // of the grid
  Grid kernel;          // with height 0 the row is copied
  int expert;
  float scale;
};

__device__ Window window_of_row(const PoolParams& p, int row) {
  const int b = sequence_of_row(p.out_cu_seqlens, static_cast<int>(p.num_seqs), row);
  const int in_sequence = row - p.out_cu_seqlens[b], first = p.cu_seqlens[b];
  int dropped = 0;  // number of rows that were dropped before this one
  for (int i = p.images.cu_images[b]; i < p.images.cu_images[b + 1]; ++i) {
    const int start = p.images.starts[i], expert = p.experts[i], visual = in_sequence + dropped - start;
    if (visual < 0) break;
    if (expert < 0) continue;
    const Grid grid = grid_at(p.images.grids, i), kernel = grid_at(p.kernels, expert);
    const Grid pooled = pooled_grid(grid, kernel);
    const int num_pooled = static_cast<int>(num_rows(pooled));
    if (visual < num_pooled) {
      const int y = visual / pooled.width * kernel.height, x = visual % pooled.width * kernel.width;
      return {.corner = first + start + y * grid.width + x,
              .width = grid.width,
              .kernel = kernel,
              .expert = expert,
              .scale = p.scales ? p.scales[i] : 1.0f};
    }
    dropped += static_cast<int>(num_rows(grid)) - num_pooled;
  }
  return {.corner = first + in_sequence + dropped, .width = 0, .kernel = {}, .expert = 0, .scale = 0};
}

// NaN wins, as in torch's max_pool2d.
__device__ float max_or_nan(float best, float value) { return value > best || value != value ? value : best; }

template <class T, PoolFunction kFunction, int kWidth>
__device__ Vector<T, kWidth> pooled(const PoolParams& p, const Window& w, const T* corner, const T* weights) {
  float values[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = kFunction == PoolFunction::max ? -INFINITY : 0.0f;
  // kAtOnce elements are being loaded before the first is used: most windows have no more.
  constexpr int kAtOnce = 4;
  const int area = w.kernel.height * w.kernel.width;
  int x = 0, y = 0;
  for (int first = 0; first < area; first += kAtOnce) {
    Vector<T, kWidth> loaded[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j >= area) break;
      loaded[j] = load<kWidth>(corner + (y * w.width + x) * p.x_stride);
      if (++x == w.kernel.width) x = 0, ++y;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j >= area) break;
      float elements[kWidth], factors[kWidth];
      to_floats(elements, loaded[j]);
      if constexpr (kFunction == PoolFunction::conv) {
        to_floats(factors, load<kWidth>(weights + (first + j) * p.hidden_size));
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if constexpr (kFunction == PoolFunction::max) values[i] = max_or_nan(values[i], elements[i]);
        if constexpr (kFunction == PoolFunction::avg) values[i] += elements[i];
        if constexpr (kFunction == PoolFunction::conv) values[i] += elements[i] * factors[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if constexpr (kFunction == PoolFunction::avg) values[i] /= static_cast<float>(area);
    values[i] *= w.scale;
  }
  return from_floats<T>(values);
}

// A block writes one output row.
template <class T, PoolFunction kFunction, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_kernel(PoolParams p, const __grid_constant__ ConvWeights conv) {
  const int row = static_cast<int>(blockIdx.x);
  if (row >= p.out_cu_seqlens[p.num_seqs]) return;  // a batch may be shorter than its buffer
  const Window w = window_of_row(p, row);
  const T* x = static_cast<const T*>(p.x) + w.corner * p.x_stride;
  T* out = static_cast<T*>(p.out) + row * p.hidden_size;
  const T* weights =
      kFunction == PoolFunction::conv && w.kernel.height ? static_cast<const T*>(conv.weights[w.expert]) : nullptr;
  for (int column = static_cast<int>(threadIdx.x) * kWidth; column < p.hidden_size; column += kThreads * kWidth) {
    store(out + column, w.kernel.height ? pooled<T, kFunction, kWidth>(p, w, x + column, weights + column)
                                        : load<kWidth>(x + column));
  }
}

template <class T, PoolFunction kFunction>
void run(const PoolParams& p, const ConvWeights& conv, bool is_wide, Stream stream) {
  const auto kernel = is_wide ? pool_kernel<T, kFunction, kWidest<T>> : pool_kernel<T, kFunction, 1>;
  launch("pool", kernel, dim3(static_cast<unsigned>(p.num_out_tokens)), dim3(kThreads), 0, stream, p, conv);
}

}  // namespace

void pool_kernel(const PoolParams& p, Stream stream) {
  ConvWeights conv{};
  bool is_wide = p.hidden_size * size_of(p.dtype) % 16 == 0 && is_aligned(p.x) && is_aligned(p.out) &&
                 is_aligned_stride(p.x_stride, p.dtype);
  if (p.conv_weights) {
    Checker("pool").range("number of conv experts", p.num_experts, 1, kMostConvExperts);
    for (std::int64_t e = 0; e < p.num_experts; ++e) {
      conv.weights[e] = p.conv_weights[e];
      is_wide = is_wide && is_aligned(p.conv_weights[e]);
    }
  }
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    switch (p.function) {
      case PoolFunction::max:
        return run<T, PoolFunction::max>(p, conv, is_wide, stream);
      case PoolFunction::avg:
        return run<T, PoolFunction::avg>(p, conv, is_wide, stream);
      case PoolFunction::conv:
        return run<T, PoolFunction::conv>(p, conv, is_wide, stream);
    }
  });
}

}  // namespace dpn::cuda
