// Partial results of decode attention on the CPU. The keys of a sequence are split into tasks, and the tasks' results
// are merged. Include as core/simd.h.
#pragma once

#include "ops/attention/attention.h"
#include "ops/attention/decode_tile.h"

namespace dpn::DPN_ISA {

// Result of all heads of a group over a part of the keys, as floats: sums [heads, padded_dim], then maxima and weights,
// each [quads, kWidth]. In the end a row of these repeats the four values of its quad, or the one value of a single
// head; a weight is the sum of its repetitions.
struct Partial {
  float* sums;
  float* maxima;
  float* weights;

  static std::int64_t size(std::int64_t heads, std::int64_t padded_dim) {
    return round_up(heads, kQuad) * (padded_dim + 2 * kWidth / kQuad);
  }
  Partial(float* memory, std::int64_t heads, std::int64_t padded_dim)
      : sums(memory),
        maxima(sums + round_up(heads, kQuad) * padded_dim),
        weights(maxima + round_up(heads, kQuad) * kWidth / kQuad) {}

  void clear() const {
    for (float* sum = sums; sum < maxima; ++sum) *sum = 0;
    for (std::int64_t i = 0; i < weights - maxima; ++i) {
      maxima[i] = -__builtin_inff();
      weights[i] = 0;
    }
  }
};

// The query rows of a task, and its results.
template <class T>
struct TaskRows {
  const AttentionDecodeParams& p;
  const DecodeTask& task;
  float* partials;     // of all key/value heads
  std::int64_t heads;  // query heads of a key/value head
  std::int64_t padded_dim;

  Partial partial_of(std::int64_t kv_head) const {
    return {partials + kv_head * Partial::size(heads, padded_dim), heads, padded_dim};
  }
  const T* query(std::int64_t head) const {
    return static_cast<const T*>(p.q) + task.sequence * p.q_stride[0] + head * p.q_stride[1];
  }
};

// Computes the out row of one head of a group from the partial results of its splits, which are `stride` floats apart.
template <class T>
void reduce(T* out, const Partial& first, std::int64_t stride, std::int64_t splits, std::int64_t head,
            std::int64_t heads, std::int64_t head_dim, std::int64_t padded_dim, float scale) {
  const std::int64_t state = head / kQuad * kWidth + head % kQuad;
  const int lanes_apart = heads == 1 ? 1 : kQuad;  // distance between the weights of one head
  float maximum = first.maxima[state];
  for (std::int64_t s = 1; s < splits; ++s) {
    const float other = first.maxima[s * stride + state];
    maximum = other > maximum ? other : maximum;
  }
  alignas(64) float sums[kMaxHeadDim] = {};
  float weight = 0;
  for (std::int64_t s = 0; s < splits; ++s) {
    const float factor = exp2_negative<float>(broadcast(first.maxima[s * stride + state] - maximum), scale)[0];
    for (int i = 0; i < kWidth; i += lanes_apart) weight += factor * first.weights[s * stride + state + i];
    const float* partial = first.sums + s * stride + head * padded_dim;
    for (std::int64_t i = 0; i < head_dim; i += kWidth) store(sums + i, load(sums + i) + load(partial + i) * factor);
  }
  for_each_vector(head_dim, [&](std::int64_t i, int n) { store_n(out + i, load(sums + i) * (1.0f / weight), n); });
}

}  // namespace dpn::DPN_ISA
