// The tile registers of AMX. Include as simd.h, where the compiler's target has them.
#pragma once

#include "core/simd.h"

namespace dpn::DPN_ISA {

constexpr std::int64_t kTileSide = 16;              // rows of a tile, and elements of 4 bytes in a row
constexpr std::int64_t kTileBytes = 4 * kTileSide;  // of a row

// Writes to memory are done before the next tile is loaded: gcc 12 does not know that _tile_loadconfig and _tile_loadd
// read memory.
inline void publish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

struct TileShape {
  std::uint8_t rows;
  std::uint16_t bytes;  // of a row
};

// While it lives, the calling thread has 8 tiles. It belongs into a task of a parallel region: libraries configure
// tiles of their own on the same threads, so none may be left configured, or found so.
class ConfiguredTiles {
 public:
  explicit ConfiguredTiles(const TileShape (&shapes)[8]) {
    struct alignas(64) {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.bytes[tile] = shapes[tile].bytes;
      config.rows[tile] = shapes[tile].rows;
    }
    publish(&config);
    _tile_loadconfig(&config);
  }
  // All of kTileSide rows of kTileBytes.
  ConfiguredTiles() : ConfiguredTiles({kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull}) {}
  ~ConfiguredTiles() { _tile_release(); }
  ConfiguredTiles(const ConfiguredTiles&) = delete;
  ConfiguredTiles& operator=(const ConfiguredTiles&) = delete;

  static constexpr TileShape kFull{kTileSide, kTileBytes};
};

}  // namespace dpn::DPN_ISA
