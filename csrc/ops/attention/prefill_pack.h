// Packs queries, keys and values into units, in the order in which prefill_tile.h reads them.
#pragma once

#include "core/transpose.h"
#include "ops/attention/prefill_tile.h"

namespace dpn::DPN_ISA {

// Converts one row to units, with zeros up to row_units.
template <class T>
inline void pack_row(Unit<T>* target, const T* source, std::int64_t head_dim) {
  const std::int64_t units = head_dim / kUnitSize<Unit<T>>;
  if constexpr (sizeof(Unit<T>) == sizeof(T) * kUnitSize<Unit<T>>) {  // no element changes its type
    std::memcpy(target, source, static_cast<std::size_t>(head_dim) * sizeof(T));
  } else {
    for (std::int64_t i = 0; i < units; ++i) to_unit(target + i, source + i);
  }
  for (std::int64_t i = units; i < row_units<Unit<T>>(head_dim); ++i) target[i] = {};
}

inline VecF load_row(const float* source) { return load(source); }
#if defined(__AVX512BF16__)
inline VecU load_row(const bf16* source) { return load_units(reinterpret_cast<const Pair*>(source)); }
#else
inline VecF load_row(const bf16* source) { return load(source); }
#endif

// The row at `source`; where it has fewer than kSize valid elements (or none), a copy of these followed by zeros.
template <class T, int kSize>
struct PaddedRow {
  T copy[kSize];

  const T* get(const T* source, std::int64_t valid) {
    if (valid >= kSize) return source;
    for (int i = 0; i < kSize; ++i) copy[i] = i < valid ? source[i] : T{};
    return copy;
  }
};

// Packs keys [0, count) as [panels, row_units, kPanel]. Lanes without a key are zero up to whole vectors.
template <class T>
inline void pack_keys(Unit<T>* target, const T* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim) {
  constexpr int kStep = kUnitSize<Unit<T>>;
  const std::int64_t steps = row_units<Unit<T>>(head_dim);
  PaddedRow<T, kWidth * kStep> padded;
  for (std::int64_t key = 0; key < count; key += kWidth) {
    Unit<T>* panel = target + key / kPanel * steps * kPanel + key % kPanel;
    for (std::int64_t step = 0; step < steps; step += kWidth) {
      decltype(load_units(target)) rows[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        const std::int64_t valid = key + r < count ? head_dim - step * kStep : 0;
        rows[r] = load_row(padded.get(keys + (key + r) * stride + step * kStep, valid));
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        if (step + r < steps) store_units(panel + (step + r) * kPanel, rows[r]);
      }
    }
  }
}

// Packs the values of keys [0, count) as [panels of the head, keys / kUnitSize, kPanel], panels panel_stride units
// apart. Elements after the data are zero, up to whole vectors or kDepth of keys and to pairs of vectors of the head.
template <class T>
inline void pack_values(Unit<T>* target, std::int64_t panel_stride, const T* values, std::int64_t stride,
                        std::int64_t count, std::int64_t head_dim) {
  constexpr int kStep = kUnitSize<Unit<T>>, kRun = 2 * kWidth;
  const std::int64_t padded_count = round_up(count, kDepth<Unit<T>> > kWidth ? kDepth<Unit<T>> : kWidth);
  T pair[2 * kRun];
  for (std::int64_t key = 0; key < padded_count; key += kStep) {
    for (std::int64_t column = 0; column < head_dim; column += kRun) {
      const T* source = values + key * stride + column;
      std::int64_t source_stride = stride;
      if (key + kStep > count || column + kRun > head_dim) {
        for (int i = 0; i < kStep * kRun; ++i) {
          const bool valid = key + i / kRun < count && column + i % kRun < head_dim;
          pair[i] = valid ? source[i / kRun * stride + i % kRun] : T{};
        }
        source = pair;
        source_stride = kRun;
      }
      decltype(load_units(target)) columns[2];
      load_values(columns, source, source_stride);
      Unit<T>* row = target + column / kPanel * panel_stride + key / kStep * kPanel + column % kPanel;
      store_units(row, columns[0]);
      store_units(row + kWidth, columns[1]);
    }
  }
}

}  // namespace dpn::DPN_ISA
