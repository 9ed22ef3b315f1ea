// Many rows of x, quantised, times all weights, with AMX: blocks of 32 rows times 32 weight rows. Beyond what
// multiply_tiles.h asks of a form of weights F, this asks for
//   F::kSignedBytes                                whether unpack gives signed numbers
//   F::unpack(panel, lines, bytes)                 [lines * kQuadsPerLine, 16, 4] weights in 8 bits
//   F::Sums                                        what is kept of a block: AmxBlock of integers or floats
//   F::add_part(params, operands, steps, sums)     adds the products of some columns; with steps.begin == 0 to none
//   F::sum(sums, block, m, half)                   kWidth sums of all columns
// Include as core/tiles.h.
#pragma once

#include "core/tiles.h"
#include "ops/quantized/multiply_tiles.h"

namespace dpn::DPN_ISA {

constexpr int kAmxRows = 2 * int{kTileSide};  // of x, and of weights

// Sums of kAmxRows rows of x and kAmxRows weights: four tiles, each in consecutive memory.
template <class Element>
struct alignas(64) AmxBlock {
  static constexpr int kTiles = 2;
  Element tiles[kTiles][2][kTileSide][kTileSide];  // tiles of rows, halves of the weights

  const Element* row(std::int64_t m, int half) const { return tiles[m / kTileSide][half][m % kTileSide]; }
};
using AmxTotals = AmxBlock<std::int32_t>;

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

// Two panels that follow, prefetched some lines at each step of 64 columns: all at once they would hold the buffers
// that the tiles' own lines need, and to wait for them took a fifth of the time.
class NextWeights {
 public:
  NextWeights(const std::uint8_t* first, const std::uint8_t* second, std::int64_t lines, std::int64_t steps)
      : first_(first), second_(second), lines_per_step_(ceil_div(lines, steps > 0 ? steps : 1)) {
    constexpr std::int64_t kMost = 2;
    if (lines_per_step_ > kMost) lines_per_step_ = kMost;
  }

  void prefetch() {
    for (std::int64_t i = 0; i < lines_per_step_; ++i) {
      __builtin_prefetch(first_, 0, 2);
      __builtin_prefetch(second_, 0, 2);
      first_ += kLineBytes;
      second_ += kLineBytes;
    }
  }

 private:
  const std::uint8_t *first_, *second_;
  std::int64_t lines_per_step_;
};

// Tiles 0 to 3 = totals, or zeros.
template <int kRowTiles>
void start_tiles(const AmxTotals* totals) {
  if (totals) {
    _tile_loadd(0, totals->tiles[0][0], kTileBytes);
    _tile_loadd(1, totals->tiles[0][1], kTileBytes);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(2, totals->tiles[1][0], kTileBytes);
      _tile_loadd(3, totals->tiles[1][1], kTileBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Tiles 0 to 3 += kRowTiles * 16 rows of a times 2 * 16 rows of b, over `steps` steps of 64 columns.
template <bool kSignedBytes, int kRowTiles>
void multiply_steps(const std::uint8_t* a0, const std::uint8_t* a1, const std::uint8_t* b0, const std::uint8_t* b1,
                    std::int64_t steps, NextWeights& next) {
  constexpr std::int64_t kTile = kTileSide * kTileBytes;
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
}

// Two panels, `columns` bytes a row.
struct Panels {
  const std::uint8_t* first;
  const std::uint8_t* second;
  std::int64_t columns;
};

struct AmxOperands {
  std::int64_t rows[2];  // of the weight, the first of each panel
  const Panels& panels;
  const Block& block;
  NextWeights& next;
};

// Consecutive steps of 64 columns.
struct Steps {
  std::int64_t begin, end;
};

inline int row_tiles(const Block& block) { return block.num_tokens > kTileSide ? 2 : 1; }

// Tiles 0 to 3 = products of some columns, added to `totals` unless they are null.
template <bool kSignedBytes>
void multiply_steps(const AmxOperands& operands, Steps steps, const AmxTotals* totals) {
  const auto& [rows, panels, block, next] = operands;
  const std::int64_t offset = steps.begin * kTileSide * kTileBytes, count = steps.end - steps.begin;
  const auto* a0 = reinterpret_cast<const std::uint8_t*>(block.packed) + offset;
  const std::uint8_t* a1 = a0 + kTileSide * panels.columns;
  const std::uint8_t *b0 = panels.first + offset, *b1 = panels.second + offset;
  publish(a0);
  if (row_tiles(block) == 2) {
    start_tiles<2>(totals);
    multiply_steps<kSignedBytes, 2>(a0, a1, b0, b1, count, next);
  } else {
    start_tiles<1>(totals);
    multiply_steps<kSignedBytes, 1>(a0, a1, b0, b1, count, next);
  }
}

inline void store_tiles(const Block& block, AmxTotals& totals) {
  _tile_stored(0, totals.tiles[0][0], kTileBytes);
  _tile_stored(1, totals.tiles[0][1], kTileBytes);
  if (row_tiles(block) == 2) {
    _tile_stored(2, totals.tiles[1][0], kTileBytes);
    _tile_stored(3, totals.tiles[1][1], kTileBytes);
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

// Writes past the caches; publish_lines lets other threads see it.
inline void store_line(void* target, __m512i line) { _mm512_stream_si512(static_cast<__m512i*>(target), line); }
inline void publish_lines() { _mm_sfence(); }

inline void store_lines(float* out, VecF first, VecF second) {
  store_line(out, reinterpret_cast<__m512i>(first));
  store_line(out + kWidth, reinterpret_cast<__m512i>(second));
}
inline void store_lines(bf16* out, VecF first, VecF second) {
  const auto join = []<std::size_t... Lane>(VecH a, VecH b, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(a, b, Lane...);
  };
  store_line(out, reinterpret_cast<__m512i>(
                      join(to_bf16_portably(first), to_bf16_portably(second), std::make_index_sequence<2 * kWidth>())));
}

// Vectors of weights in a tile, of which two are multiplied at a time: half as many results are still whole lines.
constexpr int kAmxVectors = 4;
template <class Form>
using AmxSums = typename Form::Sums[kAmxVectors / 2];  // of a block

// Many results go past the caches: to read what they replace took a third of the time.
template <class Form, class T>
void store_block(const QuantizedLinearParams& p, const Tile<kAmxVectors>& tile, const Block& block,
                 const AmxSums<Form>& sums, bool past_caches) {
  const Results<T, kAmxVectors> results(p, Form::row_scale(p), tile);
  for (std::int64_t m = 0; m < block.num_tokens; ++m) {
    T* const out = static_cast<T*>(p.out) + (block.first_token + m) * p.out_columns();
    const auto sum = [&](int v) { return Form::sum(sums[v / 2], block, m, v % 2); };
    const auto result = [&](int v) { return results.at(v, block.scales[m], sum); };
    if (past_caches) {
      for (int v = 0; v < results.count(); v += 2) store_lines(out + tile.rows[v], result(v), result(v + 1));
    } else {
      for (int v = 0; v < results.count() && tile.counts[v] > 0; ++v) {
        store_columns(out + tile.rows[v], result(v), tile.counts[v]);
      }
    }
  }
}

// Whether the results are many, and tiles give whole lines of them.
template <class T>
bool goes_past_caches(const QuantizedLinearParams& p) {
  constexpr std::int64_t kMany = 1024 * 1024;
  return p.num_tokens * p.out_columns() * std::int64_t{sizeof(T)} >= kMany &&
         p.out_columns() % columns_of_tile<kAmxVectors>(p) == 0 && reinterpret_cast<std::uintptr_t>(p.out) % 64 == 0;
}

// Chunks of rows stay in the second-level cache, as in multiply_tiles. The sums of a chunk are kept while parts of the
// columns are multiplied one after the other: of each part, the weights stay in the first-level cache.
template <class Form, class T>
void multiply_amx(const QuantizedLinearParams& p) {
  static_assert(sizeof(AmxSums<Form>) == 2 * kAmxBlockBytes);
  Columns columns = Form::columns(p);
  const std::int64_t lines = columns.quads / Form::kQuadsPerLine;
  columns.quads = ceil_div(columns.quads, kTileSide) * kTileSide;
  const QuantizedRows rows = quantize_tiles<T>(p, columns);
  const std::int64_t blocks = ceil_div(p.num_tokens, kAmxRows), tiles = num_tiles<kAmxVectors>(p);
  const std::int64_t chunks = ceil_div(blocks, amx_blocks_in_chunk(p.num_tokens, p.in_features));
  const std::int64_t ranges = tasks_for_rows(tiles, lines * kLineBytes * kAmxVectors * blocks);
  const std::int64_t steps = columns.quads / kTileSide, parts = amx_parts(p.in_features);
  const bool past_caches = goes_past_caches<T>(p);
  // Two steps stay together: a group of 128 columns.
  const auto step_of_part = [=](std::int64_t part) { return part == parts ? steps : steps / 2 * part / parts * 2; };
  parallel_for(ranges * chunks, [&](std::int64_t task, int thread) {
    const ConfiguredTiles configured;
    const std::int64_t range = task / chunks, chunk = task % chunks;
    const std::int64_t begin = blocks * chunk / chunks, end = blocks * (chunk + 1) / chunks;
    const std::int64_t panel_bytes = columns.quads * kLineBytes;
    std::uint8_t* const unpacked = rows.rest + thread * amx_bytes_of_thread(p.num_tokens, p.in_features);
    auto* const sums = reinterpret_cast<AmxSums<Form>*>(unpacked + 2 * panel_bytes);
    const auto nth_block = [&](std::int64_t b) {
      const std::int64_t first = b * kAmxRows, left = p.num_tokens - first;
      return Block{first, left < kAmxRows ? left : kAmxRows, rows.packed + first * columns.quads, rows.scales + first,
                   rows.starts + first * columns.groups};
    };
    const auto multiply_pair = [&](const Tile<kAmxVectors>& tile, int pair, bool is_last) {
      const std::uint8_t* const* weight = tile.weight + 2 * pair;
      const Panels panels{whole_panel<Form>(weight[0], lines, columns.quads, unpacked),
                          whole_panel<Form>(weight[1], lines, columns.quads, unpacked + panel_bytes),
                          columns.quads * 4};
      NextWeights next(pair == 0 ? weight[2] : tile.weight[0] + tile.lookahead,
                       pair == 0 ? weight[3] : tile.weight[1] + tile.lookahead, lines, (end - begin) * steps);
      for (std::int64_t part = 0; part < parts; ++part) {
        for (std::int64_t b = begin; b < end; ++b) {
          const Block block = nth_block(b);
          Form::add_part(p, {{tile.rows[2 * pair], tile.rows[2 * pair + 1]}, panels, block, next},
                         {step_of_part(part), step_of_part(part + 1)}, sums[b - begin][pair]);
          if (is_last && part == parts - 1) store_block<Form, T>(p, tile, block, sums[b - begin], past_caches);
        }
      }
    };
    for (std::int64_t t = tiles * range / ranges; t < tiles * (range + 1) / ranges; ++t) {
      const Tile<kAmxVectors> tile = tile_at<kAmxVectors>(p, t, lines);
      const bool has_two = tile.counts[2] > 0;
      multiply_pair(tile, 0, !has_two);
      if (has_two) multiply_pair(tile, 1, true);
    }
    if (past_caches) publish_lines();
  });
}

}  // namespace dpn::DPN_ISA
