// CUDA C++ as far as the kernels use it, on top of the emulated machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "global_memory.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (dpn::emulation::current().index)
#define blockIdx (dpn::emulation::block_index)
#define blockDim (dpn::emulation::block_size)
#define gridDim (dpn::emulation::grid_size)

inline void __syncthreads() { dpn::emulation::block_barrier(); }

inline void __syncwarp(unsigned = ~0u) {
  dpn::emulation::warp_collective("__syncwarp", nullptr, [](void* const*) {});
}

// What the block has written can be seen by others. A thread that has counted them with an atomic operation sees what
// they have released.
inline void __threadfence() {
  dpn::emulation::global_memory().release();
  if (dpn::emulation::current().has_counted) dpn::emulation::global_memory().acquire();
}

namespace dpn::emulation {

template <class T>
struct Exchange {
  T value;
  int source;  // lane
  T result;
};

// Each lane gets the value of lane `source`.
template <class T>
T exchange(const char* name, T value, int source) {
  Exchange<T> mine{value, source, value};
  warp_collective(name, &mine, [](void* const* lanes) {
    for (int i = 0; i < kWarpSize; ++i) {
      auto* lane = static_cast<Exchange<T>*>(lanes[i]);
      lane->result = static_cast<Exchange<T>*>(lanes[lane->source])->value;
    }
  });
  return mine.result;
}

template <class T>
struct Reduction {
  T value;
  T result;
};

template <class T, class Combine>
T reduce(const char* name, T value, Combine) {
  Reduction<T> mine{value, value};
  warp_collective(name, &mine, [](void* const* lanes) {
    T total = static_cast<Reduction<T>*>(lanes[0])->value;
    for (int i = 1; i < kWarpSize; ++i) total = Combine{}(total, static_cast<Reduction<T>*>(lanes[i])->value);
    for (int i = 0; i < kWarpSize; ++i) static_cast<Reduction<T>*>(lanes[i])->result = total;
  });
  return mine.result;
}

inline void require_all_lanes(unsigned mask) {
  if (mask != ~0u) fail("a warp operation of some lanes only");
}

}  // namespace dpn::emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  dpn::emulation::require_all_lanes(mask);
  return dpn::emulation::exchange("__shfl_xor_sync", value, dpn::emulation::current().lane() ^ lane_mask);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  dpn::emulation::require_all_lanes(mask);
  return dpn::emulation::exchange("__shfl_sync", value, lane & 31);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  dpn::emulation::require_all_lanes(mask);
  const int lane = dpn::emulation::current().lane(), source = lane - static_cast<int>(delta);
  return dpn::emulation::exchange("__shfl_up_sync", value, source < 0 ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  dpn::emulation::require_all_lanes(mask);
  const unsigned bit = predicate ? 1u << dpn::emulation::current().lane() : 0u;
  return dpn::emulation::reduce("__ballot_sync", bit, [](unsigned a, unsigned b) { return a | b; });
}

inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline int __reduce_add_sync(unsigned mask, int value) {
  dpn::emulation::require_all_lanes(mask);
  return dpn::emulation::reduce("__reduce_add_sync", value, [](int a, int b) { return a + b; });
}

inline int __reduce_max_sync(unsigned mask, int value) {
  dpn::emulation::require_all_lanes(mask);
  return dpn::emulation::reduce("__reduce_max_sync", value, [](int a, int b) { return a > b ? a : b; });
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

// Of a counter in global or shared memory; orders nothing else.
template <class T>
T atomicAdd(T* address, T value) {
  dpn::emulation::current().has_counted = true;
  return dpn::emulation::global_memory().add(address, value);
}
