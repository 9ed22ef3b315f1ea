// As prefill_tile.h for bf16 pairs, with AMX: two rows of tiles, 32 query rows, times two columns of tiles, 32 keys or
// elements of the head. Include as core/tiles.h.
#pragma once

#include "core/tiles.h"
#include "ops/attention/prefill_tile.h"

namespace dpn::DPN_ISA {

constexpr int kAmxRows = kStepRows<Pair>;
constexpr int kAmxColumns = 2 * int{kTileSide};
// Rows of a block's scores are a line longer than it, so that they do not share few sets of the cache.
constexpr std::int64_t kScoreStride = kKeyBlock + 16;

// out[r, c] += a[r, :] . b[:, c], or = with add false, over steps of kDepth elements. The rows of b are kPanel pairs
// apart.
template <int kRowTiles>
inline void multiply_amx(const Pair* a, std::int64_t a_stride, const Pair* b, std::int64_t steps, float* out,
                         std::int64_t out_stride, bool add) {
  const std::int64_t a_bytes = a_stride * static_cast<std::int64_t>(sizeof(Pair));
  const std::int64_t out_bytes = out_stride * static_cast<std::int64_t>(sizeof(float));
  constexpr std::int64_t kPanelBytes = kPanel * static_cast<std::int64_t>(sizeof(Pair));
  float* lower = out + kTileSide * out_stride;
  publish(a);
  if (add) {
    publish(out);
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + kTileSide, out_bytes);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(2, lower, out_bytes);
      _tile_loadd(3, lower + kTileSide, out_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, b, kPanelBytes);
    _tile_loadd(7, b + kTileSide, kPanelBytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a + kTileSide * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += kTileSide;
    b += kTileSide * kPanel;
  }
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + kTileSide, out_bytes);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, lower, out_bytes);
    _tile_stored(3, lower + kTileSide, out_bytes);
  }
}

template <int kRowTiles>
void attend_amx(const Tile<Pair>& tile, std::int64_t row, const KeyBlock<Pair>& block, const Seen<Pair>& seen,
                float scale) {
  constexpr int kUsedRows = kRowTiles * int{kTileSide};
  const std::int64_t keys = seen.end[kUsedRows - 1];
  if (keys <= 0) return;
  const std::int64_t padded = round_up(keys, kAmxColumns);
  alignas(64) float scores[kUsedRows * kScoreStride];
  Pair* const weights = reinterpret_cast<Pair*>(scores);  // of a row, in the memory of its scores
  const std::int64_t units = row_units<Pair>(tile.head_dim);
  for (std::int64_t key = 0; key < padded; key += kAmxColumns) {
    multiply_amx<kRowTiles>(tile.q + row * units, units, block.k + key / kPanel * units * kPanel + key % kPanel,
                            units / kTileSide, scores + key, kScoreStride, false);
  }
  float* sums = tile.sums + row * tile.padded_dim;
  for (int r = 0; r < kUsedRows; ++r) {
    float* row_scores = scores + r * kScoreStride;
    mask_scores(row_scores, seen.first[r], seen.end[r], padded);
    const float factor = softmax_row<Pair>(row_scores, weights + r * kScoreStride, padded, scale, block.first,
                                           tile.maxima[row + r], tile.weights[row + r]);
    if (block.first || factor == 1.0f) continue;
    float* row_sums = sums + r * tile.padded_dim;
    for (std::int64_t i = 0; i < tile.padded_dim; i += kWidth) store(row_sums + i, load(row_sums + i) * factor);
  }
  for (std::int64_t column = 0; column < tile.head_dim; column += kAmxColumns) {
    multiply_amx<kRowTiles>(weights, kScoreStride, block.v + column / kPanel * block.v_stride + column % kPanel,
                            padded / kAmxColumns, sums + column, tile.padded_dim, !block.first);
  }
}

// Processes rows [row, row + kAmxRows) of the tile, or their first half if it has no others; otherwise as in
// prefill_tile.h.
inline void attend(const Tile<Pair>& tile, std::int64_t row, const KeyBlock<Pair>& block, const Seen<Pair>& seen,
                   float scale) {
  if (tile.rows - row > kTileSide) {
    attend_amx<2>(tile, row, block, seen, scale);
  } else {
    attend_amx<1>(tile, row, block, seen, scale);
  }
}

}  // namespace dpn::DPN_ISA
