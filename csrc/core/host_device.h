// Code that the CPU and the GPU share: DPN_DEVICE marks it where nvcc compiles it for a kernel.
#pragma once

#ifdef __CUDACC__
#define DPN_DEVICE __device__
#else
#define DPN_DEVICE
#endif
