// Products of emulated tiles against plain loops, or (with the name of a fault) one use that a processor refuses.
#include "tiles.h"

#include <cmath>
#include <random>
#include <string_view>

namespace {

struct Config {
  unsigned char palette = 1, rest[15] = {};
  std::uint16_t bytes[16] = {};
  unsigned char rows[16] = {};

  Config& tile(int index, int height, int width) {
    rows[index] = static_cast<unsigned char>(height);
    bytes[index] = static_cast<std::uint16_t>(width);
    return *this;
  }
};
static_assert(sizeof(Config) == 64);

std::mt19937 random_words(std::random_device{}());

[[noreturn]] void wrong(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// sum [rows, columns], a [rows, 4 depth] bytes, b [depth, 4 columns] bytes.
void multiply_bytes(int rows, int depth, int columns, bool b_signed) {
  unsigned char a[16][64], b[16][64];
  std::uint32_t before[16][16], after[16][16];
  for (auto& row : a) {
    for (auto& byte : row) byte = static_cast<unsigned char>(random_words() % 3 ? random_words() : 0x80);
  }
  for (auto& row : b) {
    for (auto& byte : row) byte = static_cast<unsigned char>(random_words() % 3 ? random_words() : 0xFF);
  }
  for (auto& row : before) {
    for (auto& word : row) word = static_cast<std::uint32_t>(random_words());
  }
  const Config config = Config().tile(0, rows, 4 * columns).tile(3, rows, 4 * depth).tile(7, depth, 4 * columns);
  _tile_loadconfig(&config);
  _tile_loadd(0, before, sizeof before[0]);
  _tile_loadd(3, a, sizeof a[0]);
  _tile_loadd(7, b, sizeof b[0]);
  if (b_signed) {
    _tile_dpbssd(0, 3, 7);
  } else {
    _tile_dpbsud(0, 3, 7);
  }
  std::memcpy(after, before, sizeof after);
  _tile_stored(0, after, sizeof after[0]);
  _tile_release();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      std::uint32_t expected = before[m][n];
      for (int k = 0; k < 4 * depth && m < rows && n < columns; ++k) {
        const int x = static_cast<signed char>(a[m][k]), y = b[k / 4][4 * n + k % 4];
        expected += static_cast<std::uint32_t>(x * (b_signed ? static_cast<signed char>(y) : y));
      }
      if (after[m][n] != expected) wrong("a product of bytes differs");
    }
  }
}

// The order of additions is that of the manual, in double precision with a rounding after each.
void multiply_bf16(int rows, int depth, int columns) {
  std::uint16_t a[16][32], b[16][32];
  float before[16][16], after[16][16];
  const auto number = [] {
    const auto bits = static_cast<std::uint32_t>(random_words());
    if (bits % 8 == 0) return static_cast<std::uint16_t>(bits >> 16 & 0x807F);  // subnormal: counts as 0
    return static_cast<std::uint16_t>((bits >> 16 & 0x807F) | (120 + bits % 12) << 7);
  };
  const auto value = [](std::uint16_t half) {
    const bool is_small = (half & 0x7F80) == 0;
    return is_small ? 0.0f : emulation::cast<float>(static_cast<std::uint32_t>(half) << 16);
  };
  for (auto& row : a) {
    for (auto& half : row) half = number();
  }
  for (auto& row : b) {
    for (auto& half : row) half = number();
  }
  for (auto& row : before) {
    for (auto& x : row) x = value(number());
  }
  const Config config = Config().tile(2, rows, 4 * columns).tile(4, rows, 4 * depth).tile(5, depth, 4 * columns);
  _tile_loadconfig(&config);
  _tile_loadd(2, before, sizeof before[0]);
  _tile_loadd(4, a, sizeof a[0]);
  _tile_loadd(5, b, sizeof b[0]);
  _tile_dpbf16ps(2, 4, 5);
  _tile_stored(2, after, sizeof after[0]);
  _tile_release();
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      float sums[2] = {};
      for (int k = 0; k < 2 * depth; ++k) {
        const double product = double{value(a[m][k])} * value(b[k / 2][2 * n + k % 2]);
        sums[k % 2] = static_cast<float>(sums[k % 2] + product);
      }
      if (after[m][n] != before[m][n] + (sums[0] + sums[1])) wrong("a product of bf16 differs");
    }
  }
}

// What a processor refuses; each ends the process.
void fault(std::string_view name) {
  char memory[16][64] = {};
  Config config = Config().tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64).tile(3, 8, 64);
  if (name == "unconfigured") _tile_loadd(0, memory, 64);
  if (name == "palette") config.palette = 2;
  if (name == "reserved") config.rest[3] = 1;
  if (name == "rows") config.tile(4, 17, 64);
  if (name == "width") config.tile(4, 16, 68);
  if (name == "half") config.tile(4, 16, 0);
  if (name == "ninth") config.tile(8, 16, 64);
  _tile_loadconfig(&config);
  if (name == "unused") _tile_zero(5);
  if (name == "twice") _tile_loadconfig(&config);
  if (name == "same") _tile_dpbf16ps(0, 1, 1);
  if (name == "depth") _tile_dpbssd(0, 1, 3);
  if (name == "height") _tile_dpbssd(3, 1, 2);
  _tile_release();
  if (name == "released") _tile_stored(0, memory, 64);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    fault(arguments[1]);
    return 0;
  }
  const auto size = [] { return 1 + static_cast<int>(random_words() % 16); };
  for (int round = 0; round < 300; ++round) {
    multiply_bytes(size(), size(), size(), round % 2 == 0);
    multiply_bf16(size(), size(), size());
  }
  return 0;
}
