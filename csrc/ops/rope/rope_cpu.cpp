#include <cmath>

#include "core/parallel.h"
#include "core/simd.h"
#include "ops/rope/rope.h"

namespace dpn::DPN_ISA {

namespace {

// The two halves of a head are the real and imaginary parts of head_dim / 2 complex numbers. prepare(number, i, n) is
// called with `n` numbers of the head from element `i` on, and returns what is turned.
template <class T, class Prepare>
void rotate(T* head, const float* cosines, std::int64_t half, const Prepare& prepare) {
  const float* sines = cosines + half;
  for_each_vector(half, [&](std::int64_t i, int n) {
    const VecF real = prepare(load_n(head + i, n), i, n), imaginary = prepare(load_n(head + half + i, n), half + i, n);
    const VecF c = load_n(cosines + i, n), s = load_n(sines + i, n);
    store_n(head + i, real * c - imaginary * s, n);
    store_n(head + half + i, imaginary * c + real * s, n);
  });
}

// As `rotate`, of the head divided by its root mean square and multiplied by `weight`; rounded only once.
template <class T>
void norm_and_rotate(T* head, const float* cosines, std::int64_t half, const T* weight, float eps) {
  VecF squares{};
  for_each_vector(2 * half, [&](std::int64_t i, int n) {
    const VecF value = load_n(head + i, n);
    squares += value * value;
  });
  const float scale = 1.0f / std::sqrt(reduce_sum(squares) / static_cast<float>(2 * half) + eps);
  rotate(head, cosines, half, [&](VecF value, std::int64_t i, int n) { return value * scale * load_n(weight + i, n); });
}

template <class T>
void rope_store_row(const RopeStoreParams& p, std::int64_t token, std::int64_t sequence) {
  const std::int64_t cache_row = p.cache_rows[token];
  const float* cosines = p.cos_sin + p.positions[token] * p.head_dim;
  T* q = static_cast<T*>(p.qkv) + token * p.qkv_stride;
  T* k = q + p.num_heads * p.head_dim;
  const T* v = k + p.num_kv_heads * p.head_dim;
  for (std::int64_t head = 0; head < p.num_heads + p.num_kv_heads; ++head) {
    if (const auto* weight = static_cast<const T*>(head < p.num_heads ? p.q_norm : p.k_norm)) {
      norm_and_rotate(q + head * p.head_dim, cosines, p.head_dim / 2, weight, p.eps);
    } else {
      rotate(q + head * p.head_dim, cosines, p.head_dim / 2, [](VecF value, std::int64_t, int) { return value; });
    }
  }
  const std::int64_t block = p.block_table[sequence * p.max_blocks + cache_row / p.block_size];
  const std::int64_t head_stride = p.block_size * p.head_dim;
  T* k_cache = static_cast<T*>(p.kv_cache) +
               (block * p.layers_per_block + p.layer_in_block) * 2 * p.num_kv_heads * head_stride +
               cache_row % p.block_size * p.head_dim;
  T* v_cache = k_cache + p.num_kv_heads * head_stride;
  const std::size_t head_bytes = static_cast<std::size_t>(p.head_dim) * sizeof(T);
  for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {
    std::memcpy(k_cache + head * head_stride, k + head * p.head_dim, head_bytes);
    std::memcpy(v_cache + head * head_stride, v + head * p.head_dim, head_bytes);
  }
}

template <class T>
void rope_store_rows(const RopeStoreParams& p) {
  const std::int64_t row_bytes =
      (2 * p.num_heads + 6 * p.num_kv_heads) * p.head_dim * static_cast<std::int64_t>(sizeof(T));
  parallel_rows(p.cu_seqlens[p.num_seqs], row_bytes, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t sequence = 0;
    for (std::int64_t token = begin; token < end; ++token) {
      while (token >= p.cu_seqlens[sequence + 1]) ++sequence;
      rope_store_row<T>(p, token, sequence);
    }
  });
}

}  // namespace

void rope_store_kernel(const RopeStoreParams& p) {
  p.dtype == DType::f32 ? rope_store_rows<float>(p) : rope_store_rows<bf16>(p);
}

}  // namespace dpn::DPN_ISA
