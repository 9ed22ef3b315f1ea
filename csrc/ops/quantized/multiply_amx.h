// Many rows of x, quantised, times all weights, with AMX: blocks of 32 rows times 32 weight rows. Beyond what
// multiply_tiles.h asks of a form of weights F, this asks for
//   F::kSignedBytes                              whether unpack gives signed numbers
//   F::unpack(panel, lines, bytes)               [lines * kQuadsPerLine, 16, 4] weights in 8 bits
//   F::kGroupQuads                               groups of 4 columns that are summed as integers; 0: all
//   F::add_group(params, tile, block, group, totals, sums)  adds their sums to those of the block, which group 0
//                                                starts; not asked for where all columns are summed as integers
// Include as core/tiles.h.
#pragma once

#include "core/tiles.h"
#include "ops/quantized/multiply_tiles.h"

namespace dpn::DPN_ISA {

constexpr int kAmxRows = 2 * int{kTileSide};  // of x, and of weights
using AmxSums = float[kAmxRows][kAmxRows];

// Products of kAmxRows rows of x and of weights: four tiles, each in consecutive memory.
struct alignas(64) AmxTotals {
  std::int32_t tiles[2][2][kTileSide][kTileSide];

  // Of row m of x, and kTileSide weights from `half * kTileSide` on.
  VecI row(std::int64_t m, int half) const {
    VecI totals;
    std::memcpy(&totals, tiles[m / kTileSide][half][m % kTileSide], sizeof totals);
    return totals;
  }
};

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
        const auto place = static_cast<std::uint64_t>(quad);
        std::memcpy(line + place / kTileSide * kTileSide * kTileBytes + place % kTileSide * 4, bytes, kWidth);
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

// totals = kRowTiles * 16 rows of a times 2 * 16 rows of b, over `steps` steps of 64 columns; or is added to them.
template <bool kSignedBytes, int kRowTiles>
void multiply_steps(const std::uint8_t* a0, const std::uint8_t* a1, const std::uint8_t* b0, const std::uint8_t* b1,
                    std::int64_t steps, bool add, AmxTotals& totals, NextWeights& next) {
  constexpr std::int64_t kTile = kTileSide * kTileBytes;
  publish(a0);
  if (add) {
    _tile_loadd(0, totals.tiles[0][0], kTileBytes);
    _tile_loadd(1, totals.tiles[0][1], kTileBytes);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(2, totals.tiles[1][0], kTileBytes);
      _tile_loadd(3, totals.tiles[1][1], kTileBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
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
  _tile_stored(0, totals.tiles[0][0], kTileBytes);
  _tile_stored(1, totals.tiles[0][1], kTileBytes);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, totals.tiles[1][0], kTileBytes);
    _tile_stored(3, totals.tiles[1][1], kTileBytes);
  }
}

// Two panels, `columns` bytes a row.
struct Panels {
  const std::uint8_t* first;
  const std::uint8_t* second;
  std::int64_t columns;
};

// Consecutive steps of 64 columns.
struct Steps {
  std::int64_t begin, end;
};

template <bool kSignedBytes>
void multiply_steps(const Block& block, const Panels& panels, Steps steps, bool add, AmxTotals& totals,
                    NextWeights& next) {
  const std::int64_t offset = steps.begin * kTileSide * kTileBytes, count = steps.end - steps.begin;
  const auto* a0 = reinterpret_cast<const std::uint8_t*>(block.packed) + offset;
  const std::uint8_t* a1 = a0 + kTileSide * panels.columns;
  const std::uint8_t *b0 = panels.first + offset, *b1 = panels.second + offset;
  if (block.num_tokens > kTileSide) {
    multiply_steps<kSignedBytes, 2>(a0, a1, b0, b1, count, add, totals, next);
  } else {
    multiply_steps<kSignedBytes, 1>(a0, a1, b0, b1, count, add, totals, next);
  }
}

// The bytes of a panel in tiles of 16 groups of 4 columns: in place, or unpacked and filled up.
template <class Form>
const std::uint8_t* whole_panel(const std::uint8_t* panel, std::int64_t lines, std::int64_t quads,
                                std::uint8_t* unpacked) {
  if (Form::kQuadsPerLine == 1 && lines == quads) return panel;
  Form::unpack(panel, lines, unpacked);
  const std::int64_t used = lines * Form::kQuadsPerLine * kLineBytes;
  std::memset(unpacked + used, 0, static_cast<std::size_t>(quads * kLineBytes - used));
  return unpacked;
}

// Writes whole lines past the caches; publish_lines lets other threads see them.
template <std::size_t kBytes>
void store_lines(void* target, const void* lines) {
  static_assert(kBytes % kLineBytes == 0);
  for (std::size_t i = 0; i < kBytes; i += kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(target) + i),
                        _mm512_loadu_si512(static_cast<const char*>(lines) + i));
  }
}
inline void publish_lines() { _mm_sfence(); }

// Groups of columns, one after the other; each has a scale of its own.
template <class Form>
void multiply_groups(const QuantizedLinearParams& p, const Tile<2>& tile, const Block& block, const Panels& panels,
                     AmxSums& sums, NextWeights& next) {
  constexpr std::int64_t kSteps = Form::kGroupQuads / kTileSide;
  AmxTotals totals;
  const std::int64_t steps = panels.columns / kTileBytes;
  if (steps == 0) std::memset(sums, 0, sizeof sums);
  for (std::int64_t begin = 0, group = 0; begin < steps; begin += kSteps, ++group) {
    const Steps of_group{begin, begin + kSteps < steps ? begin + kSteps : steps};
    multiply_steps<Form::kSignedBytes>(block, panels, of_group, false, totals, next);
    Form::add_group(p, tile, block, group, totals, sums);
  }
}

// The exact sums of all columns. Results that fill the second-level cache go past it, a line at a time: reading what
// they replace took a third of the time.
template <class T>
void store_totals(const QuantizedLinearParams& p, const float* row_scale, const Tile<2>& tile, const Block& block,
                  const AmxTotals& totals, bool past_caches) {
  VecF scale[2], bias[2];
  int counts[2];
  for (int half = 0; half < 2; ++half) {
    const std::int64_t n = tile.first_row + half * kWidth, left = p.out_features - n;
    counts[half] = left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
    scale[half] = load_n(row_scale + n, counts[half]);
    bias[half] = p.bias ? load_n(static_cast<const T*>(p.bias) + n, counts[half]) : VecF{};
  }
  for (std::int64_t m = 0; m < block.num_tokens; ++m) {
    T* const out = static_cast<T*>(p.out) + (block.first_token + m) * p.out_features + tile.first_row;
    alignas(64) T lines[kAmxRows];
    T* const target = past_caches ? lines : out;
    for (int half = 0; half < 2; ++half) {
      if (counts[half] == 0) break;
      const VecU total = reinterpret_cast<VecU>(totals.row(m, half)) + static_cast<std::uint32_t>(block.starts[m]);
      const VecF sum = __builtin_convertvector(reinterpret_cast<VecI>(total), VecF);
      store_columns(target + half * kWidth, sum * block.scales[m] * scale[half] + bias[half], counts[half]);
    }
    if (past_caches) store_lines<sizeof lines>(out, lines);
  }
}

// Whether the results are many, and consist of whole lines.
template <class T>
bool goes_past_caches(const QuantizedLinearParams& p) {
  constexpr std::int64_t kMany = 1024 * 1024;
  return p.num_tokens * p.out_features * std::int64_t{sizeof(T)} >= kMany && p.out_features % kAmxRows == 0 &&
         reinterpret_cast<std::uintptr_t>(p.out) % 64 == 0;
}

// Chunks of rows stay in the second-level cache, as in multiply_tiles. The exact sums of many columns are kept while
// parts of the columns are multiplied one after the other: of each part, the weights stay in the first-level cache.
template <class Form, class T>
void multiply_amx(const QuantizedLinearParams& p) {
  Columns columns = Form::columns(p);
  const std::int64_t lines = columns.quads / Form::kQuadsPerLine;
  columns.quads = ceil_div(columns.quads, kTileSide) * kTileSide;
  const QuantizedRows rows = quantize_tiles<T>(p, columns);
  const std::int64_t blocks = ceil_div(p.num_tokens, kAmxRows), tiles = ceil_div(p.out_features, kAmxRows);
  const std::int64_t chunks = ceil_div(blocks, amx_blocks_in_chunk(p.num_tokens, p.in_features));
  const std::int64_t ranges = tasks_for_rows(tiles, lines * kLineBytes * 2 * blocks);
  const std::int64_t steps = columns.quads / kTileSide;
  const std::int64_t parts = Form::kGroupQuads > 0 ? 1 : amx_parts(p.in_features);
  const bool past_caches = goes_past_caches<T>(p);
  parallel_for(ranges * chunks, [&](std::int64_t task, int thread) {
    const ConfiguredTiles configured;
    const std::int64_t range = task / chunks, chunk = task % chunks;
    const std::int64_t begin = blocks * chunk / chunks, end = blocks * (chunk + 1) / chunks;
    const std::int64_t panel_bytes = columns.quads * kLineBytes;
    std::uint8_t* const unpacked = rows.rest + thread * amx_bytes_of_thread(p.num_tokens, p.in_features);
    auto* const totals = reinterpret_cast<AmxTotals*>(unpacked + 2 * panel_bytes);
    for (std::int64_t t = tiles * range / ranges; t < tiles * (range + 1) / ranges; ++t) {
      const Tile<2> tile = tile_at<2>(p, t, lines);
      const Panels panels{whole_panel<Form>(tile.weight[0], lines, columns.quads, unpacked),
                          whole_panel<Form>(tile.weight[1], lines, columns.quads, unpacked + panel_bytes),
                          columns.quads * 4};
      NextWeights next(tile, (end - begin) * steps);
      for (std::int64_t part = 0; part < parts; ++part) {
        const Steps of_part{steps * part / parts, steps * (part + 1) / parts};
        for (std::int64_t b = begin; b < end; ++b) {
          const std::int64_t first = b * kAmxRows, left = p.num_tokens - first;
          const Block block{first, left < kAmxRows ? left : kAmxRows, rows.packed + first * columns.quads,
                            rows.scales + first, rows.starts + first * columns.groups};
          if constexpr (Form::kGroupQuads > 0) {
            alignas(64) AmxSums sums;
            multiply_groups<Form>(p, tile, block, panels, sums, next);
            store_sums<T, 2>(p, Form::row_scale(p), tile, block, sums);
          } else {
            AmxTotals& sums = totals[parts > 1 ? b - begin : 0];
            multiply_steps<Form::kSignedBytes>(block, panels, of_part, part > 0, sums, next);
            if (part == parts - 1) store_totals<T>(p, Form::row_scale(p), tile, block, sums, past_caches);
          }
        }
      }
    }
    if (past_caches) publish_lines();
  });
}

}  // namespace dpn::DPN_ISA
