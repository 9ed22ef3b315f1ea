// Rows of x, quantised, times all weights in one form. Include as simd.h.
//
// A form of weights F has
//   F::columns(params)                                    how its columns are cut
//   F::kQuadsPerLine                                      groups of 4 columns in 64 bytes of a panel
//   F::multiply<Vectors, Rows>(params, tile, block, sums) a block of rows times a tile, which has 1 column at least
//   F::row_scale(params)                                  [out_features] scales that sums lack yet, or null
#pragma once

#include "ops/activation/activation_simd.h"
#include "ops/quantized/quantize_rows.h"

namespace dpn::DPN_ISA {

constexpr std::int64_t kLineBytes = kPanelRows * 4;      // of a panel, for 4 or 8 columns
constexpr int kPanelVectors = int{kPanelRows} / kWidth;  // vectors of weights in a panel

// Vectors of kWidth weight rows each, which are multiplied together: some panels, or a part of one. Where the result is
// gated, the first half are gates, and the second half what they are multiplied with.
template <int Vectors>
struct Tile {
  static constexpr int kRows = Vectors * kWidth;

  std::int64_t rows[Vectors];           // of the weight, the first of each vector
  int counts[Vectors];                  // of rows that there are
  const std::uint8_t* weight[Vectors];  // first bytes of each vector; kLineBytes to its next ones
  std::int64_t lookahead;               // bytes to the next panels
};

// Rows of x that are multiplied together: their sums with a tile fill the registers.
template <int Vectors>
constexpr int kMostRows = Dot4::kSums / Vectors;

struct Block {
  std::int64_t first_token;
  std::int64_t num_tokens;
  const Dot4::Activations* packed;  // [quads, num_tokens]
  const float* scales;              // [num_tokens]
  const std::int32_t* starts;       // [num_tokens, groups]
};

template <int Vectors>
using TileSums = float[kMostRows<Vectors>][Tile<Vectors>::kRows];

template <int Vectors>
std::int64_t columns_of_tile(const QuantizedLinearParams& p) {
  return p.is_gated() ? Tile<Vectors>::kRows / 2 : Tile<Vectors>::kRows;
}

template <int Vectors>
std::int64_t num_tiles(const QuantizedLinearParams& p) {
  return ceil_div(p.out_columns(), columns_of_tile<Vectors>(p));
}

template <int Vectors>
Tile<Vectors> tile_at(const QuantizedLinearParams& p, std::int64_t index, std::int64_t lines) {
  const std::int64_t panel_bytes = lines * kLineBytes, columns = columns_of_tile<Vectors>(p), first = index * columns;
  Tile<Vectors> tile;
  tile.lookahead = columns > kPanelRows ? columns / kPanelRows * panel_bytes : panel_bytes;
  for (int v = 0; v < Vectors; ++v) {
    const std::int64_t half = v * kWidth / columns, column = first + v * kWidth % columns;
    const std::int64_t left = p.out_columns() - column;
    tile.counts[v] = left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
    // Where the weights end within a tile, its first vector is multiplied again, and those sums are not stored.
    const std::int64_t n = half * p.out_columns() + (left > 0 ? column : first);
    tile.rows[v] = n;
    tile.weight[v] = p.weight + n / kPanelRows * panel_bytes + n % kPanelRows * 4;
  }
  return tile;
}

inline Block block_at(const QuantizedRows& rows, const Columns& columns, std::int64_t index) {
  const std::int64_t first = rows.first_of(index);
  return {first, rows.first_of(index + 1) - first, rows.packed + first * columns.quads, rows.scales + first,
          rows.starts + first * columns.groups};
}

// Panels are only some pages long, and the processor's own prefetcher starts anew in every page. Where `line` is read,
// the same line of the next tile is prefetched; but Intel's processors read several panels a third faster if these
// are prefetched a few lines ahead instead (measured on one with AMX).
template <int Vectors>
void prefetch_next(const Tile<Vectors>& tile, std::int64_t line) {
#if defined(__AMX_INT8__)
  const std::int64_t ahead = Vectors > 2 ? 8 * kLineBytes : tile.lookahead;
#else
  const std::int64_t ahead = tile.lookahead;
#endif
  for (int v = 0; v < Vectors; ++v) {
    if (v % kPanelVectors != 0 && v != Vectors / 2) continue;  // a panel's first, or what gates are multiplied with
    __builtin_prefetch(tile.weight[v] + line * kLineBytes + ahead, 0, 2);
  }
}

// What the sums of a tile become: scaled, biased, and activated.
template <class T, int Vectors>
class Results {
 public:
  Results(const QuantizedLinearParams& p, const float* row_scale, const Tile<Vectors>& tile)
      : activation_(p.activation), count_(p.is_gated() ? Vectors / 2 : Vectors) {
    for (int v = 0; v < Vectors; ++v) {
      const std::int64_t n = tile.rows[v];
      scale_[v] = row_scale ? load_n(row_scale + n, tile.counts[v]) : broadcast(1.0f);
      bias_[v] = p.bias ? load_n(static_cast<const T*>(p.bias) + n, tile.counts[v]) : VecF{};
    }
  }

  // Vectors of results.
  int count() const { return count_; }

  // Vector v of the results of a row with scale `factor`; sum(i) is vector i of its sums.
  template <class Sum>
  VecF at(int v, float factor, const Sum& sum) const {
    const VecF value = sum(v) * factor * scale_[v] + bias_[v];
    if (activation_ == ActivationKind::none) return value;
    if (activation_ != ActivationKind::silu_mul) return activate(value, activation_);
    const int up = v + count_;
    return silu(value) * (sum(up) * factor * scale_[up] + bias_[up]);
  }

 private:
  ActivationKind activation_;
  int count_;
  VecF scale_[Vectors], bias_[Vectors];
};

template <class T, int Vectors>
void store_sums(const QuantizedLinearParams& p, const float* row_scale, const Tile<Vectors>& tile, const Block& block,
                const float (*sums)[Tile<Vectors>::kRows]) {
  const Results<T, Vectors> results(p, row_scale, tile);
  for (std::int64_t m = 0; m < block.num_tokens; ++m) {
    T* const out = static_cast<T*>(p.out) + (block.first_token + m) * p.out_columns();
    const auto sum = [&](int v) { return load(sums[m] + v * kWidth); };
    for (int v = 0; v < results.count() && tile.counts[v] > 0; ++v) {
      store_columns(out + tile.rows[v], results.at(v, block.scales[m], sum), tile.counts[v]);
    }
  }
}

template <class Form, int Vectors, int Rows = kMostRows<Vectors>>
void multiply_block(const QuantizedLinearParams& p, const Tile<Vectors>& tile, const Block& block,
                    TileSums<Vectors>& sums) {
  if constexpr (Rows > 1) {
    if (block.num_tokens < Rows) return multiply_block<Form, Vectors, Rows - 1>(p, tile, block, sums);
  }
  Form::template multiply<Vectors, Rows>(p, tile, block, sums);
}

// Blocks are taken in chunks that stay in the second-level cache, while the weights pass by once a chunk.
template <class Form, class T, int Vectors>
void multiply_tiles(const QuantizedLinearParams& p) {
  constexpr std::int64_t kChunkBytes = 384 * 1024;
  constexpr int kRows = Tile<Vectors>::kRows;
  const Columns columns = Form::columns(p);
  const QuantizedRows rows = quantize_rows<T>(p, columns, kMostRows<Vectors>);
  const std::int64_t row_bytes = columns.quads * static_cast<std::int64_t>(sizeof(Dot4::Activations));
  const std::int64_t wanted_chunks = ceil_div(p.num_tokens * row_bytes + 1, kChunkBytes);
  const std::int64_t chunks = wanted_chunks < rows.blocks ? wanted_chunks : rows.blocks;
  const std::int64_t tiles = num_tiles<Vectors>(p), lines = columns.quads / Form::kQuadsPerLine;
  // Consecutive tiles stay on one core, so that each core streams through memory in order.
  const std::int64_t ranges = tasks_for_rows(tiles, lines * 4 * kRows * rows.blocks);
  parallel_for(ranges * chunks, [&](std::int64_t task, int) {
    const std::int64_t range = task / chunks, chunk = task % chunks;
    TileSums<Vectors> sums = {};
    for (std::int64_t t = tiles * range / ranges; t < tiles * (range + 1) / ranges; ++t) {
      const Tile<Vectors> tile = tile_at<Vectors>(p, t, lines);
      for (std::int64_t b = rows.blocks * chunk / chunks; b < rows.blocks * (chunk + 1) / chunks; ++b) {
        const Block block = block_at(rows, columns, b);
        if (lines > 0) multiply_block<Form, Vectors>(p, tile, block, sums);
        store_sums<T, Vectors>(p, Form::row_scale(p), tile, block, sums);
      }
    }
  });
}

}  // namespace dpn::DPN_ISA
