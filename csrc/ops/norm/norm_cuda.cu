// A row is read once into registers, reduced there and written. A warp does this for a short row, a block for a long
// one.
#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/norm/norm.h"

namespace dpn::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;  // where a warp takes a row
constexpr int kMostThreads = 1024;

enum class NormKind { rms, layer };

// Sum over the threads that share a row: those of a warp, or of the block.
template <bool kRowPerWarp>
__device__ float row_sum(float value, float* partial) {
  if constexpr (kRowPerWarp) return warp_sum(value);
  return block_sum(value, partial, static_cast<int>(blockDim.x) / kWarpSize);
}

// An access has kWidth elements; each thread makes kVectors accesses in a row.
template <class T, NormKind kKind, bool kRowPerWarp, int kWidth, int kVectors>
__global__ void __launch_bounds__(kRowPerWarp ? kWarpSize * kWarpsPerBlock : kMostThreads) norm_kernel(NormParams p) {
  __shared__ float partial[3][kWarpSize];  // one array for each reduction: no barrier between them
  const int threads = kRowPerWarp ? kWarpSize : static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const std::int64_t row =
      kRowPerWarp ? static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize : blockIdx.x;
  if (row >= p.num_tokens) return;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* residual = p.residual ? static_cast<T*>(p.residual) + row * p.hidden_size : nullptr;
  const int num_vectors = static_cast<int>(p.hidden_size / kWidth);
  const float size = static_cast<float>(p.hidden_size);

  float values[kVectors][kWidth];
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int index = thread + v * threads;
    if (index >= num_vectors) continue;
    to_floats(values[v], load<kWidth>(x + index * kWidth));
    if (residual) {
      float addend[kWidth];
      to_floats(addend, load<kWidth>(residual + index * kWidth));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[v][i] += addend[i];
      const Vector<T, kWidth> rounded = from_floats<T>(values[v]);
      store(residual + index * kWidth, rounded);
      to_floats(values[v], rounded);  // the result is the same as without fusion of the addition
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += kKind == NormKind::rms ? values[v][i] * values[v][i] : values[v][i];
  }
  sum = row_sum<kRowPerWarp>(sum, partial[0]);

  float mean = 0, variance = sum / size;
  if constexpr (kKind == NormKind::layer) {
    mean = sum / size;
    // Centred values: the mean of squares minus the squared mean would lose all digits where the mean is far above the
    // spread. There the rounding of the mean matters too; the centred sum corrects it.
    float centred_sum = 0, squares = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (thread + v * threads >= num_vectors) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[v][i] -= mean;
        centred_sum += values[v][i];
        squares += values[v][i] * values[v][i];
      }
    }
    mean = row_sum<kRowPerWarp>(centred_sum, partial[1]) / size;  // of the centred values
    variance = row_sum<kRowPerWarp>(squares, partial[2]) / size - mean * mean;
  }
  const float scale = 1.0f / sqrtf(variance + p.eps);

  T* out = static_cast<T*>(p.out) + row * p.hidden_size;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int index = thread + v * threads;
    if (index >= num_vectors) continue;
    float weight[kWidth], bias[kWidth];
    to_floats(weight, load<kWidth>(static_cast<const T*>(p.weight) + index * kWidth));
    if constexpr (kKind == NormKind::layer) {
      to_floats(bias, load<kWidth>(static_cast<const T*>(p.bias) + index * kWidth));
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[v][i] = kKind == NormKind::layer ? (values[v][i] - mean) * scale * weight[i] + bias[i]
                                              : values[v][i] * scale * weight[i];
    }
    store(out + index * kWidth, from_floats<T>(values[v]));
  }
}

template <class T, NormKind kKind, int kWidth, int kVectors>
void run_blocks(const char* op, const NormParams& p, Stream stream) {
  const std::int64_t threads = ceil_div(ceil_div(p.hidden_size / kWidth, kVectors), kWarpSize) * kWarpSize;
  launch(op, norm_kernel<T, kKind, false, kWidth, kVectors>, dim3(static_cast<unsigned>(p.num_tokens)),
         dim3(static_cast<unsigned>(threads)), 0, stream, p);
}

template <class T, NormKind kKind>
void run(const char* op, const NormParams& p, Stream stream) {
  constexpr int kWide = kWidest<T>;
  const bool is_wide = p.hidden_size % kWide == 0 && is_aligned(p.x) && is_aligned(p.out) && is_aligned(p.residual) &&
                       is_aligned(p.weight) && is_aligned(p.bias) && is_aligned_stride(p.x_stride, p.dtype);
  const std::int64_t vectors = is_wide ? p.hidden_size / kWide : p.hidden_size;
  if (is_wide && vectors <= 4 * kWarpSize) {
    launch(op, norm_kernel<T, kKind, true, kWide, 4>,
           dim3(static_cast<unsigned>(ceil_div(p.num_tokens, kWarpsPerBlock))), dim3(kWarpSize * kWarpsPerBlock), 0,
           stream, p);
  } else if (is_wide && vectors <= 2 * kMostThreads) {
    run_blocks<T, kKind, kWide, 2>(op, p, stream);
  } else if (is_wide && vectors <= 4 * kMostThreads) {
    run_blocks<T, kKind, kWide, 4>(op, p, stream);
  } else if (p.hidden_size <= 4 * kMostThreads) {
    run_blocks<T, kKind, 1, 4>(op, p, stream);
  } else if (p.hidden_size <= 16 * kMostThreads) {
    run_blocks<T, kKind, 1, 16>(op, p, stream);
  } else {
    const Checker check(op);
    check.range("hidden_size", p.hidden_size, 1, (is_wide ? 4 * kWide : 16) * kMostThreads);
  }
}

}  // namespace

void rms_norm_kernel(const NormParams& p, Stream stream) {
  const char* op = p.residual ? "add_rms_norm" : "rms_norm";
  dispatch_float(p.dtype, [&](auto type) { run<decltype(type), NormKind::rms>(op, p, stream); });
}

void layer_norm_kernel(const NormParams& p, Stream stream) {
  const char* op = p.residual ? "add_layer_norm" : "layer_norm";
  dispatch_float(p.dtype, [&](auto type) { run<decltype(type), NormKind::layer>(op, p, stream); });
}

}  // namespace dpn::cuda
