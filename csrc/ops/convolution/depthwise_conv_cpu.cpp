#include <algorithm>

#include "core/parallel.h"
#include "core/simd.h"
#include "ops/convolution/depthwise_conv.h"

namespace dpn::DPN_ISA {

namespace {

constexpr int kSide = kDepthwiseSide, kBorder = kSide / 2;
// Vectors of channels that are computed together: one cache line of bfloat16.
constexpr int kVectors = kDepthwiseChannels / kWidth >= 2 ? 2 : 1;
constexpr int kGroup = kVectors * kWidth;
// Neighbouring pixels that are computed together, so that a pixel is loaded once for all of them. Their sums and the
// taps of one row of the kernel fill the registers.
constexpr int kPixels = kWidth >= 16 ? 6 : 3;
// Rows of one task: it reads kSide - 1 rows more than it writes.
constexpr std::int64_t kRows = 16;

// Some channels of the rows that are being computed, as float32 with zeros around them: pixels lie next to each other,
// whatever the number of channels is, and each is widened once. Row y is in slot (y + kBorder) % kSide.
struct RowRing {
  float* pixels;  // [kSide, depthwise_row_pixels, kGroup]
  std::int64_t row_size;

  float* row(std::int64_t y) const { return pixels + (y + kBorder) % kSide * row_size; }
};

// Channels `channel` to `channel` + `count` of an image.
template <class T>
struct Channels {
  const T* x;  // first pixel of the image
  T* out;      // first pixel of the image
  std::int64_t height;
  std::int64_t width;
  std::int64_t stride;  // channels of a pixel
  int count;
};

template <class T>
void fill_row(const Channels<T>& c, std::int64_t y, const RowRing& ring) {
  float* target = ring.row(y);
  if (y < 0 || y >= c.height) {
    std::memset(target, 0, static_cast<std::size_t>(ring.row_size) * sizeof(float));
    return;
  }
  target += kBorder * kGroup;
  const T* source = c.x + y * c.width * c.stride;
  for (std::int64_t i = 0; i < c.width; ++i, source += c.stride, target += kGroup) {
    if (c.count == kGroup) {
      for (int v = 0; v < kVectors; ++v) store(target + v * kWidth, load(source + v * kWidth));
    } else {
      for_each_vector(c.count, [&](std::int64_t k, int n) { store(target + k, load_n(source + k, n)); });
    }
  }
}

// The sums of kPixels pixels from column `column` on; `rows` are those that the kernel covers.
inline void compute_pixels(const float* const (&rows)[kSide], const float* taps, const VecF (&bias)[kVectors],
                           std::int64_t column, VecF (&sums)[kPixels][kVectors]) {
  for (auto& sum : sums) {
    for (int v = 0; v < kVectors; ++v) sum[v] = bias[v];
  }
  for (int ky = 0; ky < kSide; ++ky, taps += kSide * kGroup) {
    const float* pixel = rows[ky] + column * kGroup;
    VecF tap[kSide][kVectors];
    for (int kx = 0; kx < kSide; ++kx) {
      for (int v = 0; v < kVectors; ++v) tap[kx][v] = load(taps + kx * kGroup + v * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPixels + kSide - 1; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const VecF value = load(pixel + i * kGroup + v * kWidth);
#pragma GCC unroll 16
        for (int kx = 0; kx < kSide; ++kx) {
          if (i - kx >= 0 && i - kx < kPixels) sums[i - kx][v] += value * tap[kx][v];
        }
      }
    }
  }
}

template <class T>
inline void store_pixels(const Channels<T>& c, std::int64_t y, std::int64_t column,
                         const VecF (&sums)[kPixels][kVectors]) {
  T* target = c.out + (y * c.width + column) * c.stride;
  if (column + kPixels <= c.width && c.count == kGroup) {  // from registers
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(target + i * c.stride + v * kWidth, sums[i][v]);
    }
    return;
  }
  const std::int64_t pixels = std::min<std::int64_t>(kPixels, c.width - column);
  for (std::int64_t i = 0; i < pixels; ++i, target += c.stride) {
    for (int v = 0; v < kVectors; ++v) {
      const int n = std::min(c.count - v * kWidth, kWidth);
      if (n > 0) store_n(target + v * kWidth, sums[i][v], n);
    }
  }
}

template <class T>
void compute_band(const DepthwiseConvParams& p, std::int64_t image, std::int64_t begin, std::int64_t channel,
                  float* scratch) {
  const int count = static_cast<int>(std::min<std::int64_t>(p.channels - channel, kGroup));
  alignas(64) float taps[kSide * kSide * kGroup];
  float widened_bias[kGroup] = {};
  std::memset(taps, 0, sizeof taps);
  for_each_vector(count, [&](std::int64_t i, int n) {
    store(widened_bias + i, load_n(static_cast<const T*>(p.bias) + channel + i, n));
    for (int k = 0; k < kSide * kSide; ++k) {
      store(taps + k * kGroup + i, load_n(static_cast<const T*>(p.taps) + k * p.channels + channel + i, n));
    }
  });
  VecF bias[kVectors];
  for (int v = 0; v < kVectors; ++v) bias[v] = load(widened_bias + v * kWidth);
  const std::int64_t offset = image * p.height * p.width * p.channels + channel;
  const Channels<T> c{
      static_cast<const T*>(p.x) + offset, static_cast<T*>(p.out) + offset, p.height, p.width, p.channels, count};
  const RowRing ring{scratch, depthwise_row_pixels(p.width) * kGroup};
  std::memset(scratch, 0, static_cast<std::size_t>(kSide * ring.row_size) * sizeof(float));
  for (std::int64_t y = begin - kBorder; y < begin + kBorder; ++y) fill_row(c, y, ring);
  for (std::int64_t y = begin; y < std::min(begin + kRows, p.height); ++y) {
    fill_row(c, y + kBorder, ring);
    const float* rows[kSide];
    for (int ky = 0; ky < kSide; ++ky) rows[ky] = ring.row(y + ky - kBorder);
    for (std::int64_t column = 0; column < p.width; column += kPixels) {
      VecF sums[kPixels][kVectors];
      compute_pixels(rows, taps, bias, column, sums);
      store_pixels(c, y, column, sums);
    }
  }
}

template <class T>
void run(const DepthwiseConvParams& p) {
  const std::int64_t groups = (p.channels + kGroup - 1) / kGroup, bands = (p.height + kRows - 1) / kRows;
  parallel_for(p.num_images * bands * groups, [&](std::int64_t task, int thread) {
    const std::int64_t channel = task % groups * kGroup, band = task / groups % bands, image = task / groups / bands;
    float* scratch = static_cast<float*>(p.scratch) + thread * depthwise_scratch_floats(p.width);
    compute_band<T>(p, image, band * kRows, channel, scratch);
  });
}

}  // namespace

void depthwise_conv_kernel(const DepthwiseConvParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
