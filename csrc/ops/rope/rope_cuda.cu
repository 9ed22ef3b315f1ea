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

// Divides the numbers of a head by its root mean square and multiplies them by the weight. All threads of a block call
// it; those of one head are `count` neighbours in the same block, and each has kWidth complex numbers from `column` on.
template <class T, int kWidth>
__device__ void norm_head(float (&a)[kWidth], float (&b)[kWidth], const void* weights, float eps, int head_dim,
                          int column, int count) {
  __shared__ float squares[kThreads];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += a[i] * a[i] + b[i] * b[i];
  // Threads after the last head of a block are idle, and read anything.
  const int thread = static_cast<int>(threadIdx.x), first = min(thread / count * count, kThreads - count);
  squares[thread] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < count; ++i) sum += squares[first + i];
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(head_dim) + eps);
  const T* weight = static_cast<const T*>(weights) + column;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    a[i] *= scale * to_float(weight[i]);
    b[i] *= scale * to_float(weight[head_dim / 2 + i]);
  }
}

// The two halves of a head are the real and imaginary parts of head_dim / 2 complex numbers. A thread rotates kWidth of
// these numbers of one row, or copies them if they belong to a value head. grid (rows, parts of a row).
template <class T, int kWidth, bool kHasNorm>
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
  // With norms, all threads of a head are in one block. Threads without a head read the last one's numbers then, and
  // write nothing.
  const int used_threads = kHasNorm ? kThreads / vectors_per_head * vectors_per_head : kThreads;
  const int item = static_cast<int>(blockIdx.y) * used_threads + static_cast<int>(threadIdx.x);
  int head = item / vectors_per_head;
  const int column = item % vectors_per_head * kWidth;
  bool is_there = head < num_heads + 2 * num_kv_heads;
  if constexpr (kHasNorm) {
    is_there = is_there && static_cast<int>(threadIdx.x) < used_threads;
    head = min(head, num_heads + 2 * num_kv_heads - 1);
  } else {
    if (!is_there) return;
  }
  T* real = row + head * head_dim + column;
  Vector<T, kWidth> real_part = load<kWidth>(real), imaginary_part = load<kWidth>(real + half);
  float a[kWidth], b[kWidth];
  if constexpr (kHasNorm) {
    to_floats(a, real_part);
    to_floats(b, imaginary_part);
    norm_head<T, kWidth>(a, b, head < num_heads ? p.q_norm : p.k_norm, p.eps, head_dim, column, vectors_per_head);
    if (!is_there) return;
  }
  if (head < num_heads + num_kv_heads) {
    float cosine[kWidth], sine[kWidth];
    load_floats(cosine, cosines + column);
    load_floats(sine, cosines + half + column);
    if constexpr (!kHasNorm) {
      to_floats(a, real_part);
      to_floats(b, imaginary_part);
    }
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
    constexpr int kWide = kWidest<T>;
    const auto plain = is_wide ? rope_store_kernel<T, kWide, false> : rope_store_kernel<T, 1, false>;
    const auto normed = is_wide ? rope_store_kernel<T, kWide, true> : rope_store_kernel<T, 1, true>;
    const std::int64_t per_head = p.head_dim / 2 / (is_wide ? kWide : 1);
    if (p.q_norm) Checker("rope_store").range("head_dim of normed heads on cuda", p.head_dim, 2, 2 * kThreads);
    const std::int64_t threads = p.q_norm ? kThreads / per_head * per_head : kThreads;
    const std::int64_t items = (p.num_heads + 2 * p.num_kv_heads) * per_head;
    const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(ceil_div(items, threads)));
    launch("rope_store", p.q_norm ? normed : plain, grid, dim3(kThreads), 0, stream, p, static_cast<int>(p.num_seqs));
  });
}

}  // namespace dpn::cuda
