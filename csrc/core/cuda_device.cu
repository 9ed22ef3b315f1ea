#include <cuda_runtime.h>

#include "core/cuda_dispatch.h"
#include "core/cuda_launch.cuh"

namespace dpn::cuda {

DeviceScope::DeviceScope(int device_index) {
  check_status("cudaGetDevice", cudaGetDevice(&previous_));
  if (previous_ == device_index) return;
  check_status("cudaSetDevice", cudaSetDevice(device_index));
  changed_ = true;
}

DeviceScope::~DeviceScope() {
  if (changed_) (void)cudaSetDevice(previous_);
}

int num_multiprocessors() {
  int device = 0, count = 0;
  check_status("cudaGetDevice", cudaGetDevice(&device));
  check_status("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace dpn::cuda
