// Marks of code that the CPU and the GPU share. Compiled by nvcc, DPN_DEVICE code is the GPU's, and DPN_HOST_DEVICE
// code is the host's too.
#pragma once

#ifdef __CUDACC__
#define DPN_DEVICE __device__
#define DPN_HOST_DEVICE __host__ __device__
#else
#define DPN_DEVICE
#define DPN_HOST_DEVICE
#endif
