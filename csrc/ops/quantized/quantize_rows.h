// Rows of x as integers: symmetric, one scale a row, and in the order in which products read them. Include as simd.h.
#pragma once

#include "core/parallel.h"
#include "ops/quantized/dot4.h"
#include "ops/quantized/quantized_linear.h"
#include "ops/quantized/round_simd.h"

namespace dpn::DPN_ISA {

// How the columns of a kind of weights are cut.
struct Columns {
  std::int64_t quads;        // dot products of 4 columns in a row, padding included
  std::int64_t group_quads;  // of them in a group, which has a scale of its own
  std::int64_t groups;
  std::int32_t zero_point;  // the stored weight that stands for 0
};

// All rows, in scratch memory, cut into blocks of nearly the same size.
struct QuantizedRows {
  std::int64_t num_tokens;
  std::int64_t blocks;
  Dot4::Activations* packed;  // block by block, each [quads, rows of the block]
  float* scales;              // [num_tokens]
  std::int32_t* starts;       // [num_tokens, groups], where the integer sums of a row start: -zero_point * its sum
  std::uint8_t* rest;         // of the scratch memory

  std::int64_t first_of(std::int64_t block) const { return num_tokens * block / blocks; }
};

// `packed` has room for a multiple of `row_padding` rows.
inline QuantizedRows rows_in_scratch(const QuantizedLinearParams& p, const Columns& columns, std::int64_t blocks,
                                     std::int64_t row_padding) {
  const auto whole_lines = [](std::int64_t bytes) { return ceil_div(bytes, 64) * 64; };
  char* memory = static_cast<char*>(p.scratch);
  QuantizedRows rows{p.num_tokens, blocks, nullptr, nullptr, nullptr, nullptr};
  const std::int64_t rows_in_memory = ceil_div(p.num_tokens, row_padding) * row_padding;
  rows.packed = reinterpret_cast<Dot4::Activations*>(memory);
  memory += whole_lines(rows_in_memory * columns.quads * static_cast<std::int64_t>(sizeof(Dot4::Activations)));
  rows.scales = reinterpret_cast<float*>(memory);
  memory += whole_lines(p.num_tokens * 4);
  rows.starts = reinterpret_cast<std::int32_t*>(memory);
  rows.rest = reinterpret_cast<std::uint8_t*>(memory + whole_lines(p.num_tokens * columns.groups * 4));
  return rows;
}

// Row `token`; store_quads(quad, bytes, count) puts `count` groups of 4 columns, from number `quad` on, in their place.
template <class T, class StoreQuads>
void quantize_row(const QuantizedLinearParams& p, const Columns& columns, const QuantizedRows& rows, std::int64_t token,
                  const StoreQuads& store_quads) {
  constexpr int kQuads = kWidth / 4;
  using Bytes = std::int8_t __attribute__((vector_size(kWidth)));
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const float scale = largest_magnitude(x, p.in_features) / kInt8Steps;
  const bool is_finite = scale - scale == 0.0f, is_zero = !is_finite || scale == 0.0f;
  const Divider divider(is_zero ? 1.0f : scale);
  rows.scales[token] = is_finite ? scale : __builtin_nanf("");
  for (std::int64_t group = 0; group < columns.groups; ++group) {
    const std::int64_t end = group + 1 < columns.groups ? (group + 1) * columns.group_quads : columns.quads;
    VecI sum{};
    std::int64_t quad = group * columns.group_quads;
    const auto put = [&](VecF values, int num_quads) {
      const VecI integers = is_zero ? VecI{} : to_integers(values, divider);
      sum += integers;
      const Bytes bytes = __builtin_convertvector(integers, Bytes);
      std::int8_t lanes[kWidth];
      std::memcpy(lanes, &bytes, sizeof lanes);
      store_quads(quad, lanes, num_quads);
    };
    const std::int64_t whole = p.in_features / 4 < end ? p.in_features / 4 : end;
    for (; quad + kQuads <= whole; quad += kQuads) put(load(x + quad * 4), kQuads);
    for (; quad < end; quad += kQuads) {
      const std::int64_t left = p.in_features - quad * 4;
      const int count = left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
      put(load_n(x + quad * 4, count), end - quad < kQuads ? static_cast<int>(end - quad) : kQuads);
    }
    std::int32_t total = 0;
    for (int i = 0; i < kWidth; ++i) total += sum[i];
    rows.starts[token * columns.groups + group] = -columns.zero_point * total;
  }
}

// In blocks of `most_rows` rows at most.
template <class T>
QuantizedRows quantize_rows(const QuantizedLinearParams& p, const Columns& columns, std::int64_t most_rows) {
  const QuantizedRows rows = rows_in_scratch(p, columns, ceil_div(p.num_tokens, most_rows), 1);
  // An element takes as long as reading 8 bytes.
  parallel_rows(rows.blocks, most_rows * p.in_features * 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = rows.first_of(block), count = rows.first_of(block + 1) - first;
      for (std::int64_t i = 0; i < count; ++i) {
        Dot4::Activations* packed = rows.packed + first * columns.quads + i;
        quantize_row<T>(p, columns, rows, first + i, [=](std::int64_t quad, const std::int8_t* bytes, std::int64_t n) {
          for (std::int64_t q = 0; q < n; ++q) packed[(quad + q) * count] = Dot4::pack(bytes + 4 * q);
        });
      }
    }
  });
  return rows;
}

}  // namespace dpn::DPN_ISA
