#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/cuda_dispatch.h"

namespace dpn::cuda {

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream,
            const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulation::run_grid(op, grid, block, shared_bytes, [&] { kernel(args...); });
}

}  // namespace dpn::cuda
