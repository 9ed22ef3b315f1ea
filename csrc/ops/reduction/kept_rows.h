// Which rows of this stage the next one has, when a boundary keeps some visual rows of each image and all other rows.
#pragma once

#include <optional>

#include "core/cpu_isa.h"
#include "core/cuda_dispatch.h"
#include "core/tensor.h"

namespace dpn {

struct KeptRowsParams {
  std::int64_t* out;                   // [num_out_tokens] packed rows of this stage
  const std::int32_t* cu_seqlens;      // [num_seqs + 1]
  const std::int32_t* cu_images;       // [num_seqs + 1] first image of each sequence, then num_images
  const std::int32_t* image_starts;    // [num_images] first visual row, relative to its sequence
  const std::int32_t* image_lengths;   // [num_images] visual rows
  const std::int32_t* kept;            // [num_kept] visual rows that stay, relative to their image, ascending
  const std::int32_t* cu_kept;         // [num_images + 1]
  const std::int32_t* out_cu_seqlens;  // [num_seqs + 1]
  std::int64_t num_images;
  std::int64_t num_out_tokens;
  std::int64_t num_seqs;
};

// num_tokens: number of rows of this stage; it is not checked where it is left out.
void kept_rows(const Tensor& out, const Tensor& cu_seqlens, const Tensor& cu_images, const Tensor& image_starts,
               const Tensor& image_lengths, const Tensor& kept, const Tensor& cu_kept, const Tensor& out_cu_seqlens,
               std::optional<std::int64_t> num_tokens, Stream stream);

}  // namespace dpn

DPN_DECLARE_CPU_KERNEL(kept_rows_kernel, KeptRowsParams)
DPN_DECLARE_CUDA_KERNEL(kept_rows_kernel, KeptRowsParams)
