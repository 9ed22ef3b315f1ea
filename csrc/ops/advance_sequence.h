// What a boundary does to one sequence, on the CPU as on the GPU. Static, so that what is compiled for one instruction
// set of the CPU is never linked into code for another.
#pragma once

#include "core/host_device.h"
#include "ops/advance_layout.h"

namespace dpn {

// Expert of sequence b, -1 where it is skipped.
DPN_DEVICE static inline int chosen_expert(const AdvanceLayoutParams& p, int b) {
  if (p.grids[2 * b] * p.grids[2 * b + 1] < p.min_visual_tokens) return -1;
  const int forced = p.forced ? p.forced[b] : -1;
  const int chosen = forced >= 0 ? forced : p.routed ? p.routed[b] : 0;
  return chosen > 0 ? chosen : 0;
}

// Fills everything of sequence b that does not depend on the others; returns its rows in the next stage.
DPN_DEVICE static inline int advance_sequence(const AdvanceLayoutParams& p, int b) {
  const int height = p.grids[2 * b], width = p.grids[2 * b + 1], length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  const int chosen = chosen_expert(p, b);
  int out_height = height, out_width = width, expert = -1;
  if (chosen >= 0) {
    const int kernel_height = p.kernels[2 * chosen], kernel_width = p.kernels[2 * chosen + 1];
    if (kernel_height <= height && kernel_width <= width) {
      out_height = height / kernel_height;
      out_width = width / kernel_width;
      expert = chosen;
    }
  }
  p.chosen[b] = chosen;
  p.experts[b] = expert;
  p.scales[b] = p.probs ? p.probs[b * p.num_experts + (chosen > 0 ? chosen : 0)] : 1.0f;
  p.out_grids[2 * b] = out_height;
  p.out_grids[2 * b + 1] = out_width;
  return length - height * width + out_height * out_width;
}

// Router row i of sequence b in the next stage, whose offsets are there: behind the image it moves up with the text.
DPN_DEVICE static inline int advance_router_row(const AdvanceLayoutParams& p, int b, int i) {
  const int row = p.router_rows[i] - p.cu_seqlens[b];
  const int shrink = p.cu_seqlens[b + 1] - p.cu_seqlens[b] - (p.out_cu_seqlens[b + 1] - p.out_cu_seqlens[b]);
  return p.out_cu_seqlens[b] + row - (row > p.image_start[b] ? shrink : 0);
}

}  // namespace dpn
