// Code that the CPU and the GPU share: DPN_DEVICE marks it where nvcc compiles it for a kernel, DPN_HOST_DEVICE where
// it does so for the launch as well.
#pragma once

#ifdef __CUDACC__
#define DPN_DEVICE __device__
#define DPN_HOST_DEVICE __host__ __device__
#else
#define DPN_DEVICE
#define DPN_HOST_DEVICE
#endif
