#include "ops/convolution/depthwise_conv.h"

#include "core/aligned_buffer.h"
#include "core/check.h"
#include "core/parallel.h"

namespace dpn {

namespace {

void run(const DepthwiseConvParams& params) { DPN_CALL_CPU_KERNEL(depthwise_conv_kernel, params) }

}  // namespace

void depthwise_conv(const Tensor& out, const Tensor& x, const Tensor& taps, const Tensor& bias) {
  const Checker check("depthwise_conv");
  Dim num_images("num_images"), height("height"), width("width"), channels("channels");
  Dim num_taps("num_taps", kDepthwiseSide * kDepthwiseSide);
  check.contiguous("x", x, {&num_images, &height, &width, &channels}, {DType::f32, DType::bf16})
      .contiguous("taps", taps, {&num_taps, &channels}, {x.dtype})
      .contiguous("bias", bias, {&channels}, {x.dtype})
      .contiguous("out", out, {&num_images, &height, &width, &channels}, {x.dtype})
      .no_overlap({{"out", &out}}, {{"x", &x}, {"taps", &taps}, {"bias", &bias}});
  const AlignedBuffer scratch(max_threads() * depthwise_scratch_floats(width) * 4);
  run({.out = out.data,
       .x = x.data,
       .taps = taps.data,
       .bias = bias.data,
       .scratch = scratch.data(),
       .num_images = num_images,
       .height = height,
       .width = width,
       .channels = channels,
       .dtype = x.dtype});
}

}  // namespace dpn
