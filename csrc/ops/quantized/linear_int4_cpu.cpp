#include "ops/quantized/linear_int4.h"
#include "ops/quantized/multiply_all.h"

namespace dpn::DPN_ISA {

namespace {

// Groups of columns: the exact sum of each is converted, scaled and added in float32, in the order of the groups.
struct Int4 {
  static constexpr std::int64_t kQuadsPerLine = 2;
  static constexpr std::int64_t kGroupLines = kInt4Group / 8;

  static Columns columns(const QuantizedLinearParams& p) {
    return {.quads = ceil_div(p.in_features, 8) * 2,
            .group_quads = kInt4Group / 4,
            .groups = ceil_div(p.in_features, kInt4Group),
            .zero_point = 8};
  }

  static const float* row_scale(const QuantizedLinearParams&) { return nullptr; }

  template <int Vectors, int Rows>
  static void multiply(const QuantizedLinearParams& p, const Tile<Vectors>& tile, const Block& block,
                       TileSums<Vectors>& sums) {
    const std::int64_t lines = ceil_div(p.in_features, 8), groups = ceil_div(p.in_features, kInt4Group);
    for (int m = 0; m < Rows; ++m) {
      for (int v = 0; v < Vectors; ++v) store(sums[m] + v * kWidth, VecF{});
    }
    for (std::int64_t group = 0; group < groups; ++group) {
      VecU totals[Rows][Vectors];
      for (int m = 0; m < Rows; ++m) {
        for (VecU& total : totals[m]) total = static_cast<std::uint32_t>(block.starts[m * groups + group]) + VecU{};
      }
      const std::int64_t begin = group * kGroupLines, end = begin + kGroupLines < lines ? begin + kGroupLines : lines;
      multiply_group<Vectors, Rows>(tile, block, begin, end, totals);
      for (int v = 0; v < Vectors; ++v) {
        const VecF scale = scale_of(p, tile.rows[v], group, groups);
        for (int m = 0; m < Rows; ++m) {
          float* sum = sums[m] + v * kWidth;
          store(sum, load(sum) + __builtin_convertvector(reinterpret_cast<VecI>(totals[m][v]), VecF) * scale);
        }
      }
    }
  }

#if defined(__AMX_INT8__)
  static constexpr bool kSignedBytes = true;
  using Sums = AmxBlock<float>;

  static void unpack(const std::uint8_t* panel, std::int64_t lines, std::uint8_t* bytes) {
    using Bytes = std::uint8_t __attribute__((vector_size(kLineBytes)));
    for (std::int64_t line = 0; line < lines; ++line) {
      Bytes both;
      std::memcpy(&both, panel + line * kLineBytes, sizeof both);
      const Bytes low = (both & 15) - 8, high = (both >> 4) - 8;
      std::memcpy(bytes + line * 2 * kLineBytes, &low, sizeof low);
      std::memcpy(bytes + (line * 2 + 1) * kLineBytes, &high, sizeof high);
    }
  }

  // Two groups are multiplied before the sums are read and written: tried were 1, 2, 4 and 8.
  static void add_part(const QuantizedLinearParams& p, const AmxOperands& operands, Steps steps, Sums& sums) {
    constexpr std::int64_t kSteps = kInt4Group / kTileBytes;
    AmxTotals totals[2];
    if (steps.end == 0) sums = {};
    for (std::int64_t begin = steps.begin; begin < steps.end; begin += 2 * kSteps) {
      const std::int64_t middle = smaller(begin + kSteps, steps.end), end = smaller(middle + kSteps, steps.end);
      multiply_steps<kSignedBytes>(operands, {begin, middle}, nullptr);
      store_tiles(operands.block, totals[0]);
      if (middle == end) return add_groups<1>(p, operands, begin / kSteps, totals, sums);
      multiply_steps<kSignedBytes>(operands, {middle, end}, nullptr);
      store_tiles(operands.block, totals[1]);
      add_groups<2>(p, operands, begin / kSteps, totals, sums);
    }
  }

  static VecF sum(const Sums& sums, const Block&, std::int64_t m, int half) { return load(sums.row(m, half)); }
#endif

 private:
#if defined(__AMX_INT8__)
  static std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  // Whole tiles of rows, also for sums that are not stored.
  template <int Count>
  static void add_groups(const QuantizedLinearParams& p, const AmxOperands& operands, std::int64_t first,
                         const AmxTotals* totals, Sums& sums) {
    const std::int64_t groups = ceil_div(p.in_features, kInt4Group);
    for (int half = 0; half < 2; ++half) {
      VecF scale[Count];
      for (int i = 0; i < Count; ++i) {
        scale[i] = scale_of(p, operands.rows[half], first + i, groups);
      }
      for (int tile = 0; tile < row_tiles(operands.block); ++tile) {
        for (int m = 0; m < kTileSide; ++m) {
          VecF sum = first == 0 ? VecF{} : load(sums.tiles[tile][half][m]);
          for (int i = 0; i < Count; ++i) sum = sum + scaled(totals[i].tiles[tile][half][m], scale[i]);
          store(sums.tiles[tile][half][m], sum);
        }
      }
    }
  }

  static VecF scaled(const std::int32_t* totals, VecF scale) {
    VecI integers;
    std::memcpy(&integers, totals, sizeof integers);
    return __builtin_convertvector(integers, VecF) * scale;
  }
#endif

  // Of kWidth weight rows from `row` on.
  static VecF scale_of(const QuantizedLinearParams& p, std::int64_t row, std::int64_t group, std::int64_t groups) {
    const std::int64_t panel = row / kPanelRows, column = row % kPanelRows;
    return load(static_cast<const bf16*>(p.scale) + (panel * groups + group) * kPanelRows + column);
  }

  template <int Vectors, int Rows>
  static void multiply_group(const Tile<Vectors>& tile, const Block& block, std::int64_t begin, std::int64_t end,
                             VecU (&totals)[Rows][Vectors]) {
    const Dot4::Activations* activations = block.packed + begin * kQuadsPerLine * Rows;
    std::int64_t line = begin;
    do {
      Dot4::Weights low[Vectors], high[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        const VecU bytes = load_quads(tile.weight[v] + line * kLineBytes);
        low[v] = Dot4::unpack(bytes & 0x0F0F0F0Fu);
        high[v] = Dot4::unpack((bytes >> 4) & 0x0F0F0F0Fu);
      }
      prefetch_next(tile, line);
      for (int m = 0; m < Rows; ++m) {
        for (int v = 0; v < Vectors; ++v) {
          totals[m][v] = Dot4::multiply_add(totals[m][v], low[v], activations[m]);
          totals[m][v] = Dot4::multiply_add(totals[m][v], high[v], activations[Rows + m]);
        }
      }
      activations += kQuadsPerLine * Rows;
    } while (++line < end);  // with a loop that may run no time, gcc 12 would copy the sums in every step
  }
};

}  // namespace

void linear_int4_kernel(const QuantizedLinearParams& p) {
  p.dtype == DType::f32 ? multiply_all<Int4, float>(p) : multiply_all<Int4, bf16>(p);
}

}  // namespace dpn::DPN_ISA
