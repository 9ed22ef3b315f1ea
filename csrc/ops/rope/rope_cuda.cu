#include "core/cuda_launch.cuh"
#include "core/cuda_sequences.cuh"
#include "core/cuda_vector.cuh"
#include "ops/rope/rope.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 256;

// Reads numbers of a table, 16 bytes at a time where kWidth numbers have as many.
template <int kSize>
__device__ void load_floats(float (&values)[kSize], const float* source) {
  constexpr int kPiece = kSize < 4 ? kSize : 4;
#pragma unroll
  for (int i = 0; i < kSize; i += kPiece) {
    const Vector<float, kPiece> piece = load<kPiece>(source + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values[i + j] = piece.elements[j];
  }
}

// The two halves of a head are the real and imaginary parts of head_dim / 2 complex numbers. A thread rotates kWidth of
// these numbers of one row, or copies them if they belong to a value head. grid (rows, parts of a row).
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) rope_store_kernel(RopeStoreParams p, int num_seqs) {
  const int token = static_cast<int>(blockIdx.x);
  if (token >= p.cu_seqlens[num_seqs]) return;  // a batch may be shorter than its buffer
  const int sequence = sequence_of_row(p.cu_seqlens, num_seqs, token);
  const int cache_row = p.cache_rows[token];
  const int head_dim = static_cast<int>(p.head_dim), half = head_dim / 2, block_size = static_cast<int>(p.block_size);
  const int num_heads = static_cast<int>(p.num_heads), num_kv_heads = static_cast<int>(p.num_kv_heads);
  const float* cosines = p.cos_sin + static_cast<std::int64_t>(p.positions[token]) * head_dim;
  T* row = static_cast<T*>(p.qkv) + token * p.qkv_stride;
  const std::int64_t block = p.block_table[sequence * p.max_blocks + cache_row / block_size];
  const std::int64_t head_stride = p.block_size * p.head_dim;
  T* cache = static_cast<T*>(p.kv_cache) +
             (block * p.layers_per_block + p.layer_in_block) * 2 * num_kv_heads * head_stride +
             cache_row % block_size * head_dim;

  const int vectors_per_head = half / kWidth;
  const int item = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  const int head = item / vectors_per_head, column = item % vectors_per_head * kWidth;
  if (head >= num_heads + 2 * num_kv_heads) return;
  T* real = row + head * head_dim + column;
  Vector<T, kWidth> real_part = load<kWidth>(real), imaginary_part = load<kWidth>(real + half);
  if (head < num_heads + num_kv_heads) {
    float a[kWidth], b[kWidth], cosine[kWidth], sine[kWidth];
    load_floats(cosine, cosines + column);
    load_floats(sine, cosines + half + column);
    to_floats(a, real_part);
    to_floats(b, imaginary_part);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float turned = a[i] * cosine[i] - b[i] * sine[i];
      b[i] = b[i] * cosine[i] + a[i] * sine[i];
      a[i] = turned;
    }
    real_part = from_floats<T>(a);
    imaginary_part = from_floats<T>(b);
    store(real, real_part);
    store(real + half, imaginary_part);
  }
  if (head >= num_heads) {  // keys, then values: the order of the KV block
    T* target = cache + (head - num_heads) * head_stride + column;
    store(target, real_part);
    store(target + half, imaginary_part);
  }
}

}  // namespace

void rope_store_kernel(const RopeStoreParams& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = p.head_dim / 2 % kWidest<T> == 0 && is_aligned(p.qkv) && is_aligned(p.kv_cache) &&
                         is_aligned(p.cos_sin) && is_aligned_stride(p.qkv_stride, p.dtype);
    const auto kernel = is_wide ? rope_store_kernel<T, kWidest<T>> : rope_store_kernel<T, 1>;
    const std::int64_t items = (p.num_heads + 2 * p.num_kv_heads) * (p.head_dim / 2 / (is_wide ? kWidest<T> : 1));
    const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(ceil_div(items, kThreads)));
    launch("rope_store", kernel, grid, dim3(kThreads), 0, stream, p, static_cast<int>(p.num_seqs));
  });
}

}  // namespace dpn::cuda
