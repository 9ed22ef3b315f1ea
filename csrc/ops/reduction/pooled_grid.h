// The grid of an image after pooling. The checks and the kernels of the CPU and the GPU all take this rule from here.
// Static, so that code compiled for one instruction set of the CPU is never linked into code for another.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace dpn {

// Rows and columns of an image's visual tokens, or of a pooling kernel.
struct Grid {
  std::int32_t height;
  std::int32_t width;
};

constexpr std::int64_t kLargestKernel = 1 << 15;  // rows and columns: an area fits 32 bits

// Entry of a table [num_grids, 2].
DPN_HOST_DEVICE static inline Grid grid_at(const std::int32_t* grids, std::int64_t index) {
  return {grids[2 * index], grids[2 * index + 1]};
}

// Number of rows of the image.
DPN_HOST_DEVICE static inline std::int64_t num_rows(Grid grid) { return std::int64_t{grid.height} * grid.width; }

// Whether the kernel is small enough for the grid: neither higher nor wider.
DPN_HOST_DEVICE static inline bool fits(Grid kernel, Grid grid) {
  return kernel.height <= grid.height && kernel.width <= grid.width;
}

// The grid after pooling by a kernel that fits: stride = kernel, no padding, trailing rows and columns dropped.
DPN_HOST_DEVICE static inline Grid pooled_grid(Grid grid, Grid kernel) {
  return {grid.height / kernel.height, grid.width / kernel.width};
}

}  // namespace dpn
