#include "ops/quantized/linear_int8.h"
#include "ops/quantized/multiply_all.h"

namespace dpn::DPN_ISA {

namespace {

// One group of columns; the exact sum of a row's products is converted once.
struct Int8 {
  static constexpr std::int64_t kQuadsPerLine = 1;

  static Columns columns(const QuantizedLinearParams& p) {
    const std::int64_t quads = ceil_div(p.in_features, 4);
    return {.quads = quads, .group_quads = quads, .groups = 1, .zero_point = 128};
  }

  static const float* row_scale(const QuantizedLinearParams& p) { return static_cast<const float*>(p.scale); }

  template <int Vectors, int Rows>
  static void multiply(const QuantizedLinearParams& p, const Tile<Vectors>& tile, const Block& block,
                       TileSums<Vectors>& sums) {
    VecU totals[Rows][Vectors];
    for (int m = 0; m < Rows; ++m) {
      for (VecU& total : totals[m]) total = static_cast<std::uint32_t>(block.starts[m]) + VecU{};
    }
    const Dot4::Activations* activations = block.packed;
    const std::int64_t quads = ceil_div(p.in_features, 4);
    std::int64_t quad = 0;
    do {
      Dot4::Weights weights[Vectors];
      for (int v = 0; v < Vectors; ++v) weights[v] = Dot4::unpack(load_quads(tile.weight[v] + quad * kLineBytes));
      prefetch_next(tile, quad);
      for (int m = 0; m < Rows; ++m) {
        for (int v = 0; v < Vectors; ++v) {
          totals[m][v] = Dot4::multiply_add(totals[m][v], weights[v], activations[m]);
        }
      }
      activations += Rows;
    } while (++quad < quads);  // with a loop that may run no time, gcc 12 would copy the sums in every step
    for (int m = 0; m < Rows; ++m) {
      for (int v = 0; v < Vectors; ++v) {
        store(sums[m] + v * kWidth, __builtin_convertvector(reinterpret_cast<VecI>(totals[m][v]), VecF));
      }
    }
  }

#if defined(__AMX_INT8__)
  static constexpr bool kSignedBytes = false;
  using Sums = AmxTotals;

  static void unpack(const std::uint8_t* panel, std::int64_t lines, std::uint8_t* bytes) {
    std::memcpy(bytes, panel, static_cast<std::size_t>(lines * kLineBytes));
  }

  static void add_part(const QuantizedLinearParams&, const AmxOperands& operands, Steps steps, AmxTotals& totals) {
    multiply_steps<kSignedBytes>(operands, steps, steps.begin > 0 ? &totals : nullptr);
    store_tiles(operands.block, totals);
  }

  static VecF sum(const AmxTotals& totals, const Block& block, std::int64_t m, int half) {
    VecU total;
    std::memcpy(&total, totals.row(m, half), sizeof total);
    total += static_cast<std::uint32_t>(block.starts[m]);
    return __builtin_convertvector(reinterpret_cast<VecI>(total), VecF);
  }
#endif
};

}  // namespace

void linear_int8_kernel(const QuantizedLinearParams& p) {
  p.dtype == DType::f32 ? multiply_all<Int8, float>(p) : multiply_all<Int8, bf16>(p);
}

}  // namespace dpn::DPN_ISA
