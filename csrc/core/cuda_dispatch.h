// Calls an op's kernel on the device that holds the tensors, after the checks. This is host code without CUDA headers,
// so that a build without nvcc compiles it too.
#pragma once

#include <cstdint>

#include "core/cpu_isa.h"

namespace dpn {

// A cudaStream_t as an integer, 0 for the default stream; ignored on the CPU.
using Stream = std::uintptr_t;

#ifdef DPN_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

namespace cuda {

// Makes a device the current one while the object lives: a launch goes to the current device, whatever its stream is.
// Throws std::runtime_error when the device cannot be used.
class DeviceScope {
 public:
  explicit DeviceScope(int device_index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Number of multiprocessors of the current device. Throws std::runtime_error.
int num_multiprocessors();

}  // namespace cuda
}  // namespace dpn

// Declares the CUDA counterpart of a CPU kernel.
#define DPN_DECLARE_CUDA_KERNEL(kernel, Params) \
  namespace dpn::cuda {                         \
  void kernel(const Params&, Stream);           \
  }

// Calls a kernel that exists only on the GPU; call Checker::on_cuda before.
#ifdef DPN_HAS_CUDA
#define DPN_CALL_CUDA_KERNEL(kernel, params, tensor, stream) \
  const cuda::DeviceScope device((tensor).device_index);     \
  cuda::kernel(params, stream);
#else
#define DPN_CALL_CUDA_KERNEL(kernel, params, tensor, stream) (void)(params), (void)(tensor), (void)(stream);
#endif

// Calls the CUDA kernel and returns if `tensor` is on a GPU. Checker refuses such tensors in builds without CUDA
// kernels.
#ifdef DPN_HAS_CUDA
#define DPN_TRY_CUDA_KERNEL(kernel, params, tensor, stream) \
  if ((tensor).device == Device::cuda) {                    \
    const cuda::DeviceScope device((tensor).device_index);  \
    return cuda::kernel(params, stream);                    \
  }
#else
#define DPN_TRY_CUDA_KERNEL(kernel, params, tensor, stream) (void)(tensor), (void)(stream);
#endif

// Calls the kernel for the device that holds `tensor`.
#define DPN_CALL_KERNEL(kernel, params, tensor, stream) \
  DPN_TRY_CUDA_KERNEL(kernel, params, tensor, stream)   \
  DPN_CALL_CPU_KERNEL(kernel, params)
