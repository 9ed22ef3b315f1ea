#include <cmath>

#include "core/parallel.h"
#include "core/simd.h"
#include "ops/sampling/sample.h"
#include "ops/sampling/sample_row.h"

namespace dpn::DPN_ISA {

namespace {

using sampling::kPivots;
using sampling::Mass;

template <class T>
struct Row {
  const T* logits;
  std::int64_t vocab_size;

  float operator[](std::int64_t token) const { return to_float(logits[token]); }
};

struct Greedy {
  std::int32_t token;  // the first of the largest logits; a NaN never counts as larger
  bool is_finite;      // whether there is a softmax
};

// The largest of `count` logits that is not NaN, or -inf.
template <class T>
float largest_of(const T* logits, std::int64_t count, VecI& is_nan) {
  VecF largest = broadcast(-INFINITY);
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const VecF values = load(logits + i);
    is_nan |= values != values;
    largest = max(values, largest);
  }
  float found = reduce_max(largest);
  for (; i < count; ++i) {
    const float value = to_float(logits[i]);
    is_nan[0] |= value != value;
    found = value > found ? value : found;
  }
  return found;
}

template <class T>
Greedy choose_best(Row<T> row) {
  constexpr std::int64_t kBlock = 1024;  // tokens; the block with the largest is searched again for its place
  std::int64_t token = 0;
  float largest = -INFINITY;
  VecI is_nan{};
  for (std::int64_t first = 0; first < row.vocab_size; first += kBlock) {
    const std::int64_t left = row.vocab_size - first;
    const float found = largest_of(row.logits + first, left < kBlock ? left : kBlock, is_nan);
    if (found > largest) {
      largest = found;
      token = first;
    }
  }
  if (largest == -INFINITY) return {.token = 0, .is_finite = false};
  // The end is checked, since another thread may change what was read before.
  while (token + 1 < row.vocab_size && row[token] != largest) ++token;
  bool has_nan = false;
  for (int lane = 0; lane < kWidth; ++lane) has_nan |= is_nan[lane] != 0;
  return {.token = static_cast<std::int32_t>(token), .is_finite = largest < INFINITY && !has_nan};
}

template <class T>
Row<T> row_of(const LogitRows& rows, std::int64_t index) {
  return {static_cast<const T*>(rows.logits) + index * rows.stride, rows.vocab_size};
}

// The depths of one row's tokens, and their masses.
struct Depths {
  std::int32_t* depths;
  Mass* masses;
  std::int64_t vocab_size;

  std::uint32_t depth(std::int64_t token) const { return static_cast<std::uint32_t>(depths[token]); }

  // amounts[i]: the sum of amount(token) over the tokens whose depth is below limits[i].
  template <class Amount>
  void sum_below(const std::uint32_t (&limits)[kPivots], Mass (&amounts)[kPivots], const Amount& amount) const {
    for (int i = 0; i < kPivots; ++i) {
      Mass sum = 0;
      for (std::int64_t token = 0; token < vocab_size; ++token) sum += depth(token) < limits[i] ? amount(token) : 0;
      amounts[i] = sum;
    }
  }

  std::int32_t draw(const sampling::Kept& kept, Mass target) const {
    std::int64_t ties = 0;
    Mass sum = 0;
    for (std::int64_t token = 0;; ++token) {
      const bool is_tie = depth(token) >= kept.low && depth(token) < kept.high;
      if (depth(token) < kept.low || (is_tie && ties++ < kept.num_ties)) sum += masses[token];
      if (sum > target || token + 1 == vocab_size) return static_cast<std::int32_t>(token);
    }
  }
};

template <class T>
void sample_row(const SampleParams& p, std::int64_t index) {
  const std::int64_t vocab_size = p.rows.vocab_size, first = index * vocab_size;
  const Row<T> row = row_of<T>(p.rows, index);
  const Greedy best = choose_best(row);
  p.tokens[index] = best.token;
  p.is_finite[index] = best.is_finite;
  const float temperature = p.temperatures[index];
  if (temperature < sampling::kMinTemperature || !best.is_finite) return;
  const Depths depths{p.depths + first, p.masses + first, vocab_size};
  const float largest = row[best.token], most = sampling::deepest(p.min_p[index]);
  for (std::int64_t token = 0; token < vocab_size; ++token) {
    const std::uint32_t depth = sampling::depth_of(row[token], largest, temperature, most);
    depths.depths[token] = static_cast<std::int32_t>(depth);
    depths.masses[token] = sampling::mass_of(depth);
  }
  const sampling::Kept kept = sampling::cut(
      p.top_k[index], p.top_p[index], vocab_size,
      [&](const auto& limits, auto& amounts) {
        depths.sum_below(limits, amounts, [](std::int64_t) { return Mass{1}; });
      },
      [&](const auto& limits, auto& amounts) {
        depths.sum_below(limits, amounts, [&](std::int64_t token) { return depths.masses[token]; });
      });
  const double number =
      sampling::uniform(static_cast<std::uint64_t>(p.keys[index]), static_cast<std::uint64_t>(p.positions[index]));
  p.tokens[index] = depths.draw(kept, sampling::drawn(number, kept.mass));
}

}  // namespace

void sample_greedy_kernel(const SampleGreedyParams& p) {
  parallel_for(p.rows.num_rows, [&](std::int64_t index, int) {
    const Greedy best = p.rows.dtype == DType::f32 ? choose_best(row_of<float>(p.rows, index))
                                                   : choose_best(row_of<bf16>(p.rows, index));
    p.tokens[index] = best.is_finite ? best.token : -1;
  });
}

void sample_kernel(const SampleParams& p) {
  parallel_for(p.rows.num_rows, [&](std::int64_t index, int) {
    p.rows.dtype == DType::f32 ? sample_row<float>(p, index) : sample_row<bf16>(p, index);
  });
}

}  // namespace dpn::DPN_ISA
