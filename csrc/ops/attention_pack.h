// Packing of queries, keys and values into units, in the order in which attention_tile.h reads them.
#pragma once

#include "ops/attention_tile.h"

namespace dpn::DPN_ISA {

// One row as units.
template <class T>
inline void pack_row(Unit<T>* target, const T* source, std::int64_t head_dim) {
  constexpr int kStep = kUnitSize<Unit<T>>;
  for (std::int64_t i = 0; i < head_dim / kStep; ++i) to_unit(target + i, source + i * kStep);
}

// Keys [0, count) as [panels, head_dim / kUnitSize, kPanel]; lanes without a key are zero.
template <class T>
inline void pack_keys(Unit<T>* target, const T* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim) {
  constexpr int kStep = kUnitSize<Unit<T>>;
  const std::int64_t steps = head_dim / kStep;
  for (std::int64_t first = 0; first < count; first += kPanel, target += steps * kPanel) {
    const std::int64_t lanes = count - first < kPanel ? count - first : kPanel;
    for (std::int64_t step = 0; step < steps; ++step) {
      Unit<T>* row = target + step * kPanel;
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        to_unit(row + lane, keys + (first + lane) * stride + step * kStep);
      }
      for (std::int64_t lane = lanes; lane < kPanel; ++lane) row[lane] = Unit<T>{};
    }
  }
}

// Values of keys [0, count) as [panels of the head, keys / kUnitSize, kPanel], panels panel_stride units apart.
// Lanes and elements beyond the data are zero, up to the next multiple of kWidth keys.
template <class T>
inline void pack_values(Unit<T>* target, std::int64_t panel_stride, const T* values, std::int64_t stride,
                        std::int64_t count, std::int64_t head_dim) {
  constexpr int kStep = kUnitSize<Unit<T>>;
  const std::int64_t padded = round_up(count, kWidth);
  for (std::int64_t column = 0; column < head_dim; column += kPanel, target += panel_stride) {
    const std::int64_t lanes = head_dim - column < kPanel ? head_dim - column : kPanel;
    for (std::int64_t key = 0; key < padded; key += kStep) {
      Unit<T>* row = target + key / kStep * kPanel;
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        T elements[kStep] = {};
        for (int i = 0; i < kStep; ++i) {
          if (key + i < count) elements[i] = values[(key + i) * stride + column + lane];
        }
        to_unit(row + lane, elements);
      }
      for (std::int64_t lane = lanes; lane < kPanel; ++lane) row[lane] = Unit<T>{};
    }
  }
}

}  // namespace dpn::DPN_ISA
