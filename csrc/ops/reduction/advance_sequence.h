// The effect of a boundary on one sequence, the same on the CPU and on the GPU. Static, so that code compiled for one
// instruction set of the CPU is never linked into code for another.
#pragma once

#include "core/host_device.h"
#include "ops/reduction/advance_layout.h"
#include "ops/reduction/pooled_grid.h"

namespace dpn {

// Expert of an image of sequence b; -1 where the image is skipped.
DPN_DEVICE static inline int chosen_expert(const AdvanceLayoutParams& p, int b, Grid grid) {
  if (num_rows(grid) < p.min_visual_tokens) return -1;
  const int forced = p.forced ? p.forced[b] : -1;
  const int chosen = forced >= 0 ? forced : p.routed ? p.routed[b] : 0;
  return chosen > 0 ? chosen : 0;
}

// Writes all outputs of image i of sequence b except for its start. Returns the number of rows that it loses.
DPN_DEVICE static inline int advance_image(const AdvanceLayoutParams& p, int b, int i) {
  const Grid grid = grid_at(p.images.grids, i);
  const int chosen = chosen_expert(p, b, grid);
  Grid out_grid = grid;
  int expert = -1;
  if (chosen >= 0) {
    const Grid kernel = grid_at(p.kernels, chosen);
    if (fits(kernel, grid)) {
      out_grid = pooled_grid(grid, kernel);
      expert = chosen;
    }
  }
  p.chosen[i] = chosen;
  p.experts[i] = expert;
  p.scales[i] = p.probs ? p.probs[b * p.num_experts + (chosen > 0 ? chosen : 0)] : 1.0f;
  p.out_grids[2 * i] = out_grid.height;
  p.out_grids[2 * i + 1] = out_grid.width;
  return static_cast<int>(num_rows(grid) - num_rows(out_grid));
}

// Writes all outputs of sequence b that do not depend on other sequences. Returns its number of rows in the next stage.
DPN_DEVICE static inline int advance_sequence(const AdvanceLayoutParams& p, int b) {
  int dropped = 0;
  for (int i = p.images.cu_images[b]; i < p.images.cu_images[b + 1]; ++i) {
    p.out_image_starts[i] = p.images.starts[i] - dropped;
    dropped += advance_image(p, b, i);
  }
  return p.cu_seqlens[b + 1] - p.cu_seqlens[b] - dropped;
}

// Router row r of sequence b in the next stage. The row moves up by the rows that the images before it lose. Call this
// after the offsets and grids of the next stage are written.
DPN_DEVICE static inline int advance_router_row(const AdvanceLayoutParams& p, int b, int r) {
  const int row = p.router_rows[r] - p.cu_seqlens[b];
  std::int64_t dropped = 0;
  for (int i = p.images.cu_images[b]; i < p.images.cu_images[b + 1] && p.images.starts[i] < row; ++i) {
    dropped += num_rows(grid_at(p.images.grids, i)) - num_rows(grid_at(p.out_grids, i));
  }
  return p.out_cu_seqlens[b] + row - static_cast<int>(dropped);
}

}  // namespace dpn
