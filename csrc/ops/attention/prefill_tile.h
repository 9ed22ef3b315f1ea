// Attention of a block of query rows over a block of packed keys: scores, softmax with a running maximum, and weighted
// sum of values. The two products share one register-blocked micro-kernel. Include as core/simd.h.
#pragma once

#include "core/simd_dot.h"
#if defined(__AMX_BF16__)
#include "core/tiles.h"
#endif
#include "ops/attention/plan.h"

namespace dpn::DPN_ISA {

constexpr int kRows = 6;                        // query rows whose sums stay in registers, and
constexpr int kColumns = kWidth == 16 ? 4 : 2;  // for each of them the vectors of keys or of the head
constexpr std::int64_t kPanel = kColumns * kWidth;
static_assert(kKeyPadding % kPanel == 0 && kTileRows % kRows == 0 && kKeyBlock % kKeyPadding == 0);

// Whether products of a unit go through tile registers (prefill_amx.h).
template <class U>
constexpr bool kHasTiles = false;
#if defined(__AMX_BF16__)
template <>
inline constexpr bool kHasTiles<Pair> = true;
#endif

// Query rows that `attend` takes, and elements by which products advance: heads are filled up to them with zeros.
template <class U>
constexpr int kStepRows = kHasTiles<U> ? 32 : kRows;
template <class U>
constexpr int kDepth = kHasTiles<U> ? 32 : kUnitSize<U>;
static_assert(kTileRows % 32 == 0 && kHeadPadding % 32 == 0);

// Units of a packed row of a head.
template <class U>
constexpr std::int64_t row_units(std::int64_t head_dim) {
  return round_up(head_dim, kDepth<U>) / kUnitSize<U>;
}

// What a thread needs while it attends.
template <class U>
struct AttendScope {};
#if defined(__AMX_BF16__)
template <>
struct AttendScope<Pair> {
  const ConfiguredTiles tiles;
};
#endif

// The running state of a tile's query rows; memory has a multiple of kStepRows of them.
template <class U>
struct Tile {
  std::int64_t rows;
  const U* q;      // [rows, row_units]
  float* sums;     // [rows, padded_dim], weighted by 2^((score - maximum) * scale)
  float* maxima;   // [rows], highest score
  float* weights;  // [rows], sum of the weights
  std::int64_t head_dim;
  std::int64_t padded_dim;  // head_dim rounded up to kPanel
};

// Up to kKeyBlock keys and their values.
template <class U>
struct KeyBlock {
  const U* k;  // [panels of keys, row_units, kPanel]: consecutive keys in consecutive lanes
  const U* v;  // [panels of the head, keys / kUnitSize, kPanel], panels v_stride units apart
  std::int64_t v_stride;
  bool first;  // whether the tile's state is still empty
};

// The keys of a block that consecutive query rows see: row r sees keys [first[r], end[r]). Neither falls with r. Both
// may lie outside of the block, and a row may see none of it.
template <class U>
struct Seen {
  std::int64_t first[kStepRows<U>];
  std::int64_t end[kStepRows<U>];
};

// sums[r][c] += a[r, :] . b[:, c] over `steps` units. The rows of b are kPanel units apart.
template <class U, int kCols>
inline void multiply(const U* __restrict a, std::int64_t a_stride, const U* __restrict b, std::int64_t steps,
                     VecF (&sums)[kRows][kCols]) {
  for (std::int64_t step = 0; step < steps; ++step) {
    decltype(load_units(b)) columns[kCols];
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) columns[c] = load_units(b + step * kPanel + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto row = broadcast_unit(a + r * a_stride + step);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) sums[r][c] = dot(sums[r][c], row, columns[c]);
    }
  }
}

// out[r, c] = out[r, c] * factors[r] + a[r, :] . b[:, c]. Without factors, out[r, c] = a[r, :] . b[:, c].
template <class U, int kCols>
inline void multiply_columns(float* out, std::int64_t out_stride, const float* factors, const U* a,
                             std::int64_t a_stride, const U* b, std::int64_t steps) {
  VecF sums[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      sums[r][c] = factors ? load(out + r * out_stride + c * kWidth) * factors[r] : VecF{};
    }
  }
  multiply<U, kCols>(a, a_stride, b, steps, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) store(out + r * out_stride + c * kWidth, sums[r][c]);
  }
}

// As above for the first `count` <= kPanel columns, rounded up to vectors.
template <class U>
inline void multiply_panel(std::int64_t count, float* out, std::int64_t out_stride, const float* factors, const U* a,
                           std::int64_t a_stride, const U* b, std::int64_t steps) {
  const std::int64_t columns = (count + kWidth - 1) / kWidth;
  if (columns >= kColumns) return multiply_columns<U, kColumns>(out, out_stride, factors, a, a_stride, b, steps);
  if (columns == 1) return multiply_columns<U, 1>(out, out_stride, factors, a, a_stride, b, steps);
  if constexpr (kColumns > 2) {
    if (columns == 2) return multiply_columns<U, 2>(out, out_stride, factors, a, a_stride, b, steps);
    multiply_columns<U, 3>(out, out_stride, factors, a, a_stride, b, steps);
  }
}

// Sets the scores before number `first` and from number `end` on to minus infinity.
inline void mask_scores(float* scores, std::int64_t first, std::int64_t end, std::int64_t padded) {
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  const VecF hidden = broadcast(-__builtin_inff());
  for (std::int64_t i = 0; i < first && i < padded; i += kWidth) {
    const auto limit = static_cast<std::int32_t>(first - i);
    store(scores + i, lane < limit ? hidden : load(scores + i));
  }
  for (std::int64_t i = end > 0 ? end / kWidth * kWidth : 0; i < padded; i += kWidth) {
    const auto limit = static_cast<std::int32_t>(end - i);
    store(scores + i, lane < limit ? load(scores + i) : hidden);
  }
}

inline void store_weights(float* target, VecF value) { store(target, value); }
inline void store_weights(Pair* target, VecF value) { store(target->elements, value); }

// Of a multiple of kWidth scores; some at a time, since each comparison waits for the one before.
inline float highest_score(const float* scores, std::int64_t size) {
  constexpr int kAtOnce = 4;
  VecF highest[kAtOnce];
  for (VecF& value : highest) value = broadcast(-__builtin_inff());
  std::int64_t i = 0;
  for (; i + kAtOnce * kWidth <= size; i += kAtOnce * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < kAtOnce; ++j) highest[j] = max(load(scores + i + j * kWidth), highest[j]);
  }
  for (; i < size; i += kWidth) highest[0] = max(load(scores + i), highest[0]);
  return reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

// Turns one row of scores into weights and updates the row's running state. Returns the factor for earlier sums.
template <class U>
inline float softmax_row(const float* scores, U* weights, std::int64_t padded, float scale, bool first, float& maximum,
                         float& weight_sum) {
  const float block_maximum = highest_score(scores, padded);
  const float old_maximum = maximum;
  maximum = first || block_maximum > old_maximum ? block_maximum : old_maximum;
  // A row whose window has not begun yet has seen no key: its weights are 0, and so is the factor for what comes later.
  const float shift = maximum == -__builtin_inff() ? 0.0f : maximum;
  VecF sum{};
  std::int64_t i = 0;
  for (; i + 2 * kWidth <= padded; i += 2 * kWidth) {
    const VecF low = exp2_negative<U>(load(scores + i) - shift, scale);
    const VecF high = exp2_negative<U>(load(scores + i + kWidth) - shift, scale);
    sum += low + high;
    store_elements(weights + i / kUnitSize<U>, low, high);
  }
  if (i < padded) {
    const VecF last = exp2_negative<U>(load(scores + i) - shift, scale);
    sum += last;
    store_weights(weights + i / kUnitSize<U>, last);
  }
  const float factor = first ? 0.0f : exp2_negative<float>(broadcast(old_maximum - shift), scale)[0];
  weight_sum = first ? reduce_sum(sum) : weight_sum * factor + reduce_sum(sum);
  return factor;
}

// Processes rows [row, row + kRows) of the tile. `scale` includes log2(e).
template <class U>
void attend(const Tile<U>& tile, std::int64_t row, const KeyBlock<U>& block, const Seen<U>& seen, float scale) {
  const std::int64_t keys = seen.end[kRows - 1];
  if (keys <= 0) return;
  const std::int64_t padded = round_up(keys, kWidth);
  alignas(64) float scores[kRows][kKeyBlock];
  alignas(64) U weights[kRows][kKeyBlock / kUnitSize<U>];
  const std::int64_t q_stride = tile.head_dim / kUnitSize<U>;
  const U* q = tile.q + row * q_stride;
  for (std::int64_t key = 0; key < padded; key += kPanel) {
    multiply_panel<U>(padded - key, scores[0] + key, kKeyBlock, nullptr, q, q_stride, block.k + key * q_stride,
                      q_stride);
  }
  float factors[kRows];
  for (int r = 0; r < kRows; ++r) {
    mask_scores(scores[r], seen.first[r], seen.end[r], padded);
    factors[r] =
        softmax_row<U>(scores[r], weights[r], padded, scale, block.first, tile.maxima[row + r], tile.weights[row + r]);
  }
  for (std::int64_t column = 0; column < tile.head_dim; column += kPanel) {
    multiply_panel<U>(tile.head_dim - column, tile.sums + row * tile.padded_dim + column, tile.padded_dim,
                      block.first ? nullptr : factors, weights[0], kKeyBlock / kUnitSize<U>,
                      block.v + column / kPanel * block.v_stride, (keys + kUnitSize<U> - 1) / kUnitSize<U>);
  }
}

}  // namespace dpn::DPN_ISA
