// The rule of kept_rows for one row, for the CPU and the GPU. Everything is static, so that code compiled for one
// instruction set of the CPU is never linked into code for another.
#pragma once

#include "core/host_device.h"
#include "ops/reduction/kept_rows.h"

namespace dpn {

// The row of this stage that row `row` of the next one is copied from. Both are relative to sequence b.
DPN_DEVICE static inline std::int32_t kept_row(const KeptRowsParams& p, std::int64_t b, std::int32_t row) {
  std::int32_t dropped = 0;  // number of rows that the images before this row lose
  for (std::int64_t i = p.cu_images[b]; i < p.cu_images[b + 1]; ++i) {
    const std::int32_t visual = row + dropped - p.image_starts[i];
    if (visual < 0) break;
    const std::int32_t num_kept = p.cu_kept[i + 1] - p.cu_kept[i];
    if (visual < num_kept) return p.image_starts[i] + p.kept[p.cu_kept[i] + visual];
    dropped += p.image_lengths[i] - num_kept;
  }
  return row + dropped;
}

}  // namespace dpn
