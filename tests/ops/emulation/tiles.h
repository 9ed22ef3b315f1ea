// AMX on arrays, from the operation sections of Intel's manual. What a processor refuses ends the process with a
// message.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "vectors.h"

namespace emulation {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// The tiles of a thread, configured by palette 1.
struct Tiles {
  bool configured = false;
  int rows[kTiles] = {};
  int bytes[kTiles] = {};
  unsigned char data[kTiles][kMostRows][kMostBytes] = {};

  void configure(const unsigned char* config) {
    // A processor allows it. Here every kernel releases its tiles, so this one was left by an earlier kernel.
    require(!configured, "tiles are configured although an earlier kernel has not released them");
    require(config[0] == 1, "palette is not 1");
    for (int i = 1; i < 16; ++i) require(config[i] == 0, "a reserved byte or start row of the configuration is not 0");
    for (int t = 0; t < kMostRows; ++t) {  // room for more tiles than palette 1 has
      std::uint16_t width;
      std::memcpy(&width, config + 16 + 2 * t, 2);
      const int height = config[48 + t];
      require(width <= kMostBytes, "a tile is wider than 64 bytes");
      require(height <= kMostRows, "a tile has more than 16 rows");
      require((width == 0) == (height == 0), "a tile has rows without bytes, or bytes without rows");
      require(t < kTiles || width == 0, "a tile after the eighth is configured");
      if (t >= kTiles) continue;
      rows[t] = height;
      bytes[t] = width;
    }
    std::memset(data, 0, sizeof data);
    configured = true;
  }

  void check(int tile) const {
    require(configured, "a tile is used without a configuration");
    require(tile >= 0 && tile < kTiles && rows[tile] > 0, "a tile is used that is not configured");
  }

  // sum [rows, n] += a [rows, k] . b [k, n], in elements of 4 bytes.
  void check_product(int sum, int a, int b) const {
    for (const int tile : {sum, a, b}) check(tile);
    require(sum != a && sum != b && a != b, "two operands of a product are the same tile");
    require(bytes[sum] % 4 == 0 && bytes[a] % 4 == 0 && bytes[b] % 4 == 0, "a tile's width is no multiple of 4 bytes");
    require(rows[sum] == rows[a], "sum and a have different numbers of rows");
    require(bytes[sum] == bytes[b], "sum and b have different widths");
    require(bytes[a] == 4 * rows[b], "a has not as many elements of 4 bytes in a row as b has rows");
  }

  Words row(int tile, int index) const {
    Words value;
    std::memcpy(&value, data[tile][index], sizeof value);
    return value;
  }

  std::uint32_t element(int tile, int index, int column) const {
    std::uint32_t value;
    std::memcpy(&value, data[tile][index] + 4 * column, 4);
    return value;
  }

  void set_row(int tile, int index, const void* source) {
    std::memset(data[tile][index], 0, kMostBytes);
    std::memcpy(data[tile][index], source, static_cast<std::size_t>(bytes[tile]));
  }
};

inline thread_local Tiles tiles;

inline Words bytes_of(Words word, int index, bool is_signed) {
  using Signed = std::int32_t __attribute__((vector_size(64)));
  const Words top = word << (24 - 8 * index);
  return is_signed ? cast<Words>(cast<Signed>(top) >> 24) : top >> 24;
}

inline void multiply_bytes(int sum, int a, int b, bool a_signed, bool b_signed) {
  tiles.check_product(sum, a, b);
  for (int m = 0; m < tiles.rows[sum]; ++m) {
    Words total = tiles.row(sum, m);
    for (int k = 0; k < tiles.rows[b]; ++k) {
      const Words x = Words{} + tiles.element(a, m, k), y = tiles.row(b, k);
      for (int i = 0; i < 4; ++i) total += bytes_of(x, i, a_signed) * bytes_of(y, i, b_signed);
    }
    tiles.set_row(sum, m, &total);
  }
}

// First and second elements of pairs are summed apart from each other, from zero on, and added to the sum at the end.
// Subnormal numbers are zeros here, also exact products of two numbers, which a processor does not round by themselves.
NOT_INLINED void multiply_bf16(int sum, int a, int b) {
  tiles.check_product(sum, a, b);
  Floats first_b[kMostRows], second_b[kMostRows];
  for (int k = 0; k < tiles.rows[b]; ++k) {
    first_b[k] = cast<Floats>(tiles.row(b, k) << 16);
    second_b[k] = cast<Floats>(tiles.row(b, k) & 0xFFFF0000u);
  }
  for (int m = 0; m < tiles.rows[sum]; ++m) {
    Floats first = {}, second = {};
    for (int k = 0; k < tiles.rows[b]; ++k) {
      const std::uint32_t pair = tiles.element(a, m, k);
      first += cast<float>(pair << 16) * first_b[k];
      second += cast<float>(pair & 0xFFFF0000u) * second_b[k];
    }
    const Floats total = cast<Floats>(tiles.row(sum, m)) + (first + second);
    tiles.set_row(sum, m, &total);
  }
}

}  // namespace emulation

inline void _tile_loadconfig(const void* config) {
  emulation::tiles.configure(static_cast<const unsigned char*>(config));
}

inline void _tile_release() { emulation::tiles.configured = false; }

inline void _tile_zero(int tile) {
  emulation::tiles.check(tile);
  std::memset(emulation::tiles.data[tile], 0, sizeof emulation::tiles.data[tile]);
}

inline void _tile_loadd(int tile, const void* base, long stride) {
  emulation::Tiles& tiles = emulation::tiles;
  tiles.check(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) tiles.set_row(tile, r, static_cast<const char*>(base) + r * stride);
}

inline void _tile_stored(int tile, void* base, long stride) {
  const emulation::Tiles& tiles = emulation::tiles;
  tiles.check(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, tiles.data[tile][r],
                static_cast<std::size_t>(tiles.bytes[tile]));
  }
}

inline void _tile_dpbssd(int sum, int a, int b) { emulation::multiply_bytes(sum, a, b, true, true); }
inline void _tile_dpbsud(int sum, int a, int b) { emulation::multiply_bytes(sum, a, b, true, false); }

inline void _tile_dpbf16ps(int sum, int a, int b) {
  // DAZ and FTZ for the product, which therefore has to stay a function of its own.
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  emulation::multiply_bf16(sum, a, b);
  __builtin_ia32_ldmxcsr(before);
}
