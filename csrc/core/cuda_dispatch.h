// From an op's checks to its kernel on the device that holds the tensors. Host code only; knows nothing of the CUDA
// headers, so that a build without nvcc compiles it too.
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

// Makes a device the current one for as long as the object lives: launches go to the current device, whatever the
// stream. Throws std::runtime_error when the device cannot be used.
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

// Of the current device. Throws std::runtime_error.
int num_multiprocessors();

}  // namespace cuda
}  // namespace dpn

// Declares the CUDA counterpart of a CPU kernel.
#define DPN_DECLARE_CUDA_KERNEL(kernel, Params) \
  namespace dpn::cuda {                         \
  void kernel(const Params&, Stream);           \
  }

// Calls a kernel that exists on the GPU alone; Checker::on_cuda comes first.
#ifdef DPN_HAS_CUDA
#define DPN_CALL_CUDA_KERNEL(kernel, params, tensor, stream) \
  const cuda::DeviceScope device((tensor).device_index);     \
  cuda::kernel(params, stream);
#else
#define DPN_CALL_CUDA_KERNEL(kernel, params, tensor, stream) (void)(params), (void)(tensor), (void)(stream);
#endif

// Calls the kernel of the device that holds `tensor`. Checker refuses CUDA tensors where there are no CUDA kernels.
#ifdef DPN_HAS_CUDA
#define DPN_CALL_KERNEL(kernel, params, tensor, stream)    \
  if ((tensor).device == Device::cuda) {                   \
    const cuda::DeviceScope device((tensor).device_index); \
    return cuda::kernel(params, stream);                   \
  }                                                        \
  DPN_CALL_CPU_KERNEL(kernel, params)
#else
#define DPN_CALL_KERNEL(kernel, params, tensor, stream) \
  (void)(tensor), (void)(stream);                       \
  DPN_CALL_CPU_KERNEL(kernel, params)
#endif
