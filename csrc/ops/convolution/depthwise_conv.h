// Depthwise 7x7 convolution of images whose channels stand side by side: each channel by itself, stride 1, zeros around
// the image. ConvNeXt's blocks and LLaVA-HR's adapters use it on the CPU; on a GPU it is torch's.
#pragma once

#include "core/cpu_isa.h"
#include "core/tensor.h"

namespace dpn {

constexpr int kDepthwiseSide = 7;       // of the kernel
constexpr int kDepthwiseChannels = 32;  // that a thread computes together, at most

struct DepthwiseConvParams {
  void* out;         // [num_images, height, width, channels]
  const void* x;     // [num_images, height, width, channels]
  const void* taps;  // [49, channels], row-major over the kernel
  const void* bias;  // [channels]
  void* scratch;     // [max_threads, depthwise_scratch_floats(width)] float32, aligned to 64 bytes
  std::int64_t num_images;
  std::int64_t height;
  std::int64_t width;
  std::int64_t channels;
  DType dtype;
};

// Pixels of a row in scratch memory: zeros on both sides, and more on the right, where a whole block of pixels is read.
constexpr std::int64_t depthwise_row_pixels(std::int64_t width) { return width + 2 * kDepthwiseSide; }

// Floats of one thread's scratch memory.
constexpr std::int64_t depthwise_scratch_floats(std::int64_t width) {
  return kDepthwiseSide * depthwise_row_pixels(width) * kDepthwiseChannels;
}

void depthwise_conv(const Tensor& out, const Tensor& x, const Tensor& taps, const Tensor& bias);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(depthwise_conv_kernel, DepthwiseConvParams)
