// Many rows of x, quantised, times all weights, with AMX: blocks of 32 rows times 32 weight rows. Beyond what
// multiply_tiles.h asks of a form of weights F, this asks for
//   F::kSignedBytes                              whether unpack gives signed numbers
//   F::unpack(panel, lines, bytes)               [lines * kQuadsPerLine, 16, 4] weights in 8 bits
//   F::kGroupQuads                               groups of 4 columns that are summed as integers; 0: all
//   F::add_group(params, tile, block, group, totals, sums)  adds their sums to those of the block
// Include as core/tiles.h.
#pragma once

#include "core/tiles.h"
#include "ops/quantized/multiply_tiles.h"

namespace dpn::DPN_ISA {

constexpr int kAmxRows = 2 * int{kTileSide};  // of x, and of weights
using AmxTotals = std::int32_t[kAmxRows][kAmxRows];
using AmxSums = float[kAmxRows][kAmxRows];

// totals = kRowTiles * 16 rows of a times 2 * 16 rows of b, over `steps` steps of 64 columns.
template <bool kSignedBytes, int kRowTiles>
void multiply_steps(const std::uint8_t* a, std::int64_t a_stride, const std::uint8_t* b0, const std::uint8_t* b1,
                    std::int64_t steps, AmxTotals& totals) {
  publish(a);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, b0, kTileBytes);
    _tile_loadd(7, b1, kTileBytes);
    _tile_loadd(4, a, a_stride);
    if constexpr (kSignedBytes) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a + kTileSide * a_stride, a_stride);
      if constexpr (kSignedBytes) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    a += kTileBytes;
    b0 += kTileSide * kTileBytes;
    b1 += kTileSide * kTileBytes;
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
                        const std::uint8_t* const (&panels)[2], AmxSums& sums) {
  alignas(64) AmxTotals totals;
  std::memset(sums, 0, sizeof sums);
  const auto* a = reinterpret_cast<const std::uint8_t*>(block.packed);
  const std::int64_t group_quads = Form::kGroupQuads > 0 ? Form::kGroupQuads : quads;
  for (std::int64_t quad = 0, group = 0; quad < quads; quad += group_quads, ++group) {
    const std::int64_t steps = (quads - quad < group_quads ? quads - quad : group_quads) / kTileSide;
    const std::uint8_t *b0 = panels[0] + quad * kLineBytes, *b1 = panels[1] + quad * kLineBytes;
    if (block.num_tokens > kTileSide) {
      multiply_steps<Form::kSignedBytes, 2>(a + quad * 4, quads * 4, b0, b1, steps, totals);
    } else {
      multiply_steps<Form::kSignedBytes, 1>(a + quad * 4, quads * 4, b0, b1, steps, totals);
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
  const QuantizedRows rows = quantize_rows<T>(p, columns, 1, kAmxRows);  // row after row
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
      for (std::int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
        const std::int64_t first = b * kAmxRows, left = p.num_tokens - first;
        const Block block{first, left < kAmxRows ? left : kAmxRows, rows.packed + first * columns.quads,
                          rows.scales + first, rows.starts + first * columns.groups};
        multiply_amx_block<Form>(p, tile, block, columns.quads, panels, sums);
        store_sums<T, 2>(p, Form::row_scale(p), tile, block, sums);
      }
    }
  });
}

}  // namespace dpn::DPN_ISA
