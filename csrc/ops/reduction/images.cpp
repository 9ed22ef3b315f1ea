#include "ops/reduction/images.h"

#include "ops/reduction/pooled_grid.h"

namespace dpn {

std::string grid_text(std::int64_t height, std::int64_t width) {
  return std::to_string(height) + "x" + std::to_string(width);
}

void check_images(const Checker& check, const Images& images, std::int64_t b, std::int64_t length) {
  std::int64_t end = 0;  // of the previous image
  for (std::int64_t i = images.cu_images[b]; i < images.cu_images[b + 1]; ++i) {
    const Grid grid = grid_at(images.grids, i);
    const std::int64_t start = images.starts[i];
    const auto is = [&] { return at("grids", i) + " is " + grid_text(grid.height, grid.width); };
    if (grid.height < 0 || grid.width < 0) check.fail(is() + ", expected no negative size");
    if (start < 0 || start + num_rows(grid) > length) {
      check.fail(is() + " from row " + std::to_string(start) + " on, but the sequence has " + std::to_string(length) +
                 " rows");
    }
    if (start < end) {
      check.fail(at("image_starts", i) + " is " + std::to_string(start) + ", expected at least " + std::to_string(end) +
                 ", where the image before it ends");
    }
    end = start + num_rows(grid);
  }
}

}  // namespace dpn
