// Many rows of x, quantised, times all weights, with AMX: blocks of 32 rows times 32 weight rows. Beyond what
// multiply_tiles.h asks of a form of weights F, this asks for
//   F::kSignedBytes                              whether unpack gives signed numbers
//   F::unpack(panel, lines, bytes)               [lines * kQuadsPerLine, 16, 4] weights in 8 bits
//   F::kGroupQuads                               groups of 4 columns that are summed as integers; 0: all
//   F::add_group(params, tile, block, group, totals, sums)  adds their sums to those of the block, which group 0 starts
// Include as core/tiles.h.
#pragma once

#include "core/tiles.h"
#include "ops/quantized/multiply_tiles.h"

namespace dpn::DPN_ISA {

constexpr int kAmxRows = 2 * int{kTileSide};  // of x, and of weights
using AmxTotals = std::int32_t[kAmxRows][kAmxRows];
using AmxSums = float[kAmxRows][kAmxRows];

// All rows, in tiles: 16 rows and 64 columns lie together, tile after tile of the same rows. Loading a tile from rows
// of a matrix, some pages apart, was slower.
template <class T>
QuantizedRows quantize_tiles(const QuantizedLinearParams& p, const Columns& columns) {
  const QuantizedRows rows = rows_in_scratch(p, columns, p.num_tokens, kAmxRows);
  parallel_rows(p.num_tokens, p.in_features * 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      auto* line = reinterpret_cast<std::uint8_t*>(rows.packed + token / kTileSide * kTileSide * columns.quads) +
                   token % kTileSide * kTileBytes;
      quantize_row<T>(p, columns, rows, token, [=](std::int64_t quad, const std::int8_t* bytes, std::int64_t) {
        std::memcpy(line + quad / kTileSide * kTileSide * kTileBytes + quad % kTileSide * 4, bytes, kWidth);
      });
    }
  });
  return rows;
}

// The weights that follow, prefetched some lines at each step of 64 columns: all at once they would hold the buffers
// that the tiles' own lines need, and to wait for them took a fifth of the time.
class NextWeights {
 public:
  NextWeights(const Tile<2>& tile, std::int64_t steps)
      : line_(tile.weight[0] + tile.lookahead), lines_per_step_(lines_per_step(tile, steps)) {}

  void prefetch() {
    for (std::int64_t i = 0; i < lines_per_step_; ++i, line_ += kLineBytes) __builtin_prefetch(line_, 0, 2);
  }

 private:
  static std::int64_t lines_per_step(const Tile<2>& tile, std::int64_t steps) {
    constexpr std::int64_t kMost = 4;
    const std::int64_t needed = ceil_div(tile.lookahead / kLineBytes, steps > 0 ? steps : 1);
    return needed < kMost ? needed : kMost;
  }

  const std::uint8_t* line_;
  std::int64_t lines_per_step_;
};

// totals = kRowTiles * 16 rows of a times 2 * 16 rows of b, over `steps` steps of 64 columns.
template <bool kSignedBytes, int kRowTiles>
void multiply_steps(const std::uint8_t* a0, const std::uint8_t* a1, const std::uint8_t* b0, const std::uint8_t* b1,
                    std::int64_t steps, AmxTotals& totals, NextWeights& next) {
  constexpr std::int64_t kTile = kTileSide * kTileBytes;
  publish(a0);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, b0, kTileBytes);
    _tile_loadd(7, b1, kTileBytes);
    _tile_loadd(4, a0, kTileBytes);
    next.prefetch();
    if constexpr (kSignedBytes) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a1, kTileBytes);
      if constexpr (kSignedBytes) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    a0 += kTile;
    a1 += kTile;
    b0 += kTile;
    b1 += kTile;
  }
  _tile_stored(0, totals[0], sizeof totals[0]);
  _tile_stored(1, totals[0] + kTileSide, sizeof totals[0]);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, totals[kTileSide], sizeof totals[0]);
    _tile_stored(3, totals[kTileSide] + kTileSide, sizeof totals[0]);
  }
}

// The bytes of a panel in tiles of 16 groups of 4 columns: in place, or unpacked and filled up.
template <class Form>
const std::uint8_t* panel_bytes(const std::uint8_t* panel, std::int64_t lines, std::int64_t quads,
                                std::uint8_t* unpacked) {
  if (Form::kQuadsPerLine == 1 && lines == quads) return panel;
  Form::unpack(panel, lines, unpacked);
  const std::int64_t used = lines * Form::kQuadsPerLine * kLineBytes;
  std::memset(unpacked + used, 0, static_cast<std::size_t>(quads * kLineBytes - used));
  return unpacked;
}

template <class Form>
void multiply_amx_block(const QuantizedLinearParams& p, const Tile<2>& tile, const Block& block, std::int64_t quads,
                        const std::uint8_t* const (&panels)[2], AmxSums& sums, NextWeights& next) {
  alignas(64) AmxTotals totals;
  if (quads == 0) std::memset(sums, 0, sizeof sums);
  const auto* a0 = reinterpret_cast<const std::uint8_t*>(block.packed);
  const std::uint8_t* a1 = a0 + kTileSide * quads * 4;
  const std::int64_t group_quads = Form::kGroupQuads > 0 ? Form::kGroupQuads : quads;
  for (std::int64_t quad = 0, group = 0; quad < quads; quad += group_quads, ++group) {
    const std::int64_t steps = (quads - quad < group_quads ? quads - quad : group_quads) / kTileSide;
    const std::int64_t offset = quad * kLineBytes;
    const std::uint8_t *b0 = panels[0] + offset, *b1 = panels[1] + offset;
    if (block.num_tokens > kTileSide) {
      multiply_steps<Form::kSignedBytes, 2>(a0 + offset, a1 + offset, b0, b1, steps, totals, next);
    } else {
      multiply_steps<Form::kSignedBytes, 1>(a0 + offset, a1 + offset, b0, b1, steps, totals, next);
    }
    Form::add_group(p, tile, block, group, totals, sums);
  }
}

// Chunks of rows stay in the second-level cache, as in multiply_tiles; processors with AMX have 2 MiB of it.
template <class Form, class T>
void multiply_amx(const QuantizedLinearParams& p) {
  constexpr std::int64_t kChunkBytes = 1024 * 1024;
  Columns columns = Form::columns(p);
  const std::int64_t lines = columns.quads / Form::kQuadsPerLine;
  columns.quads = ceil_div(columns.quads, kTileSide) * kTileSide;
  const QuantizedRows rows = quantize_tiles<T>(p, columns);
  const std::int64_t blocks = ceil_div(p.num_tokens, kAmxRows), tiles = ceil_div(p.out_features, kAmxRows);
  const std::int64_t wanted_chunks = ceil_div(p.num_tokens * columns.quads * 4 + 1, kChunkBytes);
  const std::int64_t chunks = wanted_chunks < blocks ? wanted_chunks : blocks;
  const std::int64_t ranges = tasks_for_rows(tiles, lines * kLineBytes * 2 * blocks);
  parallel_for(ranges * chunks, [&](std::int64_t task, int thread) {
    const ConfiguredTiles configured;
    const std::int64_t range = task / chunks, chunk = task % chunks;
    const std::int64_t panel_size = columns.quads * kLineBytes;
    std::uint8_t* unpacked = rows.rest + thread * 2 * panel_size;
    alignas(64) AmxSums sums;
    for (std::int64_t t = tiles * range / ranges; t < tiles * (range + 1) / ranges; ++t) {
      const Tile<2> tile = tile_at<2>(p, t, lines);
      const std::uint8_t* const panels[2] = {
          panel_bytes<Form>(tile.weight[0], lines, columns.quads, unpacked),
          panel_bytes<Form>(tile.weight[1], lines, columns.quads, unpacked + panel_size)};
      const std::int64_t begin = blocks * chunk / chunks, end = blocks * (chunk + 1) / chunks;
      NextWeights next(tile, (end - begin) * columns.quads / kTileSide);
      for (std::int64_t b = begin; b < end; ++b) {
        const std::int64_t first = b * kAmxRows, left = p.num_tokens - first;
        const Block block{first, left < kAmxRows ? left : kAmxRows, rows.packed + first * columns.quads,
                          rows.scales + first, rows.starts + first * columns.groups};
        multiply_amx_block<Form>(p, tile, block, columns.quads, panels, sums, next);
        store_sums<T, 2>(p, Form::row_scale(p), tile, block, sums);
      }
    }
  });
}

}  // namespace dpn::DPN_ISA
