// The instructions of csrc/core/cuda_ptx.cuh in plain C++, from the lane layouts of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dpn::cuda {

inline unsigned char* dynamic_shared() { return emulation::shared_memory(); }

inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::shared_memory());
}

inline void cp_async_16(std::uint32_t target, const void* source, bool valid) {
  emulation::async_copy(emulation::shared_bytes(target, 16), valid ? source : nullptr);
}

inline void cp_async_commit() { emulation::async_commit(); }

template <int kPending>
void cp_async_wait() {
  emulation::async_wait(kPending);
}

namespace emulated {

struct MatrixLoad {
  const unsigned char* row;
  std::uint32_t result[4];
};

inline std::uint16_t element(void* const* lanes, int matrix, int row, int column) {
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<MatrixLoad*>(lanes[8 * matrix + row])->row + 2 * column, 2);
  return bits;
}

template <bool kTranspose>
void load_matrices(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const std::uint32_t low = kTranspose ? element(lanes, matrix, column, row) : element(lanes, matrix, row, column);
      const std::uint32_t high =
          kTranspose ? element(lanes, matrix, column + 1, row) : element(lanes, matrix, row, column + 1);
      static_cast<MatrixLoad*>(lanes[lane])->result[matrix] = low | high << 16;
    }
  }
}

inline float to_float(std::uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float to_float(std::uint16_t bits, __half) { return __half2float({bits}); }

struct MatrixProduct {
  const std::uint32_t* a;
  std::uint32_t b[2];
  float* c;
};

template <class T>
float half_of(std::uint32_t pair, int index) {
  return to_float(static_cast<std::uint16_t>(pair >> (16 * index)), T{});
}

template <class T>
void multiply(void* const* lanes) {
  float a[16][16], b[8][16];  // b: column by column
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<MatrixProduct*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      a[group][pair + i] = half_of<T>(mine->a[0], i);
      a[group + 8][pair + i] = half_of<T>(mine->a[1], i);
      a[group][pair + 8 + i] = half_of<T>(mine->a[2], i);
      a[group + 8][pair + 8 + i] = half_of<T>(mine->a[3], i);
      b[group][pair + i] = half_of<T>(mine->b[0], i);
      b[group][pair + 8 + i] = half_of<T>(mine->b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<MatrixProduct*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      mine->c[i] += sum;
    }
  }
}

}  // namespace emulated

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t row) {
  emulated::MatrixLoad mine{emulation::shared_bytes(row, 16), {}};
  emulation::warp_collective("ldmatrix", &mine, emulated::load_matrices<false>);
  std::memcpy(r, mine.result, sizeof r);
}

inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t row) {
  emulated::MatrixLoad mine{emulation::shared_bytes(row, 16), {}};
  emulation::warp_collective("ldmatrix.trans", &mine, emulated::load_matrices<true>);
  std::memcpy(r, mine.result, sizeof r);
}

template <class T>
void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated::MatrixProduct mine{a, {b0, b1}, c};
  emulation::warp_collective("mma", &mine, emulated::multiply<T>);
}

template <class T>
std::uint32_t pack(float low, float high);
template <>
inline std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16_rn(low).bits | static_cast<std::uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}
template <>
inline std::uint32_t pack<__half>(float low, float high) {
  return __float2half_rn(low).bits | static_cast<std::uint32_t>(__float2half_rn(high).bits) << 16;
}

template <class T>
const T* offset_bytes(const T* base, std::int32_t index, std::int32_t stride) {
  const auto offset = static_cast<std::uintptr_t>(static_cast<std::int64_t>(index) * stride);
  return reinterpret_cast<const T*>(reinterpret_cast<std::uintptr_t>(base) + offset);
}

inline std::uint32_t add_acq_rel(std::uint32_t* counter, std::uint32_t value) {
  emulation::global_memory().release();
  const std::uint32_t before = emulation::global_memory().add(counter, value);
  emulation::global_memory().acquire();
  return before;
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace dpn::cuda
