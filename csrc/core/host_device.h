// Attributes of code that the CPU and the GPU share. nvcc compiles DPN_DEVICE code for the GPU, and DPN_HOST_DEVICE
// code for the GPU and the host.
#pragma once

#ifdef __CUDACC__
#define DPN_DEVICE __device__
#define DPN_HOST_DEVICE __host__ __device__
#else
#define DPN_DEVICE
#define DPN_HOST_DEVICE
#endif
