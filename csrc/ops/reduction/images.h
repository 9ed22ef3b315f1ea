// The images of a packed batch: any number in each sequence.
#pragma once

#include <cstdint>

#include "core/check.h"

namespace dpn {

// Images are ordered by sequence, and within a sequence by their rows.
struct Images {
  const std::int32_t* cu_images;  // [num_seqs + 1] first image of each sequence, then num_images
  const std::int32_t* starts;     // [num_images] first visual row, relative to its sequence
  const std::int32_t* grids;      // [num_images, 2]: height, width
  std::int64_t num_images;
};

// A grid as text, such as "4x6", for messages.
std::string grid_text(std::int64_t height, std::int64_t width);

// Checks that the images of sequence b follow each other within its `length` rows. For tensors of the CPU.
void check_images(const Checker& check, const Images& images, std::int64_t b, std::int64_t length);

}  // namespace dpn
