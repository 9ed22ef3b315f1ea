// Launches kernels; nothing else does.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "core/cuda_dispatch.h"

namespace dpn::cuda {

// Throws std::runtime_error with the call and CUDA's error.
inline void check_status(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// Starts `kernel` on `stream` and returns; an empty grid starts nothing.
//
// op: name of the op, for error messages.
// shared_bytes: dynamic shared memory of a block.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream stream,
            const Args&... args) {
  constexpr std::size_t kSharedBytesWithoutAsking = 48 * 1024;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > kSharedBytesWithoutAsking) {
    check_status(
        op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(args...);
  check_status(op, cudaGetLastError());
}

}  // namespace dpn::cuda
