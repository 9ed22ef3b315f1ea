// Packed rows and the sequences that they belong to.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dpn::cuda {

// The sequence of a packed row below offsets[num_seqs]: the last one that starts at or before it. Sequences without
// rows are passed over.
__device__ inline int sequence_of_row(const std::int32_t* offsets, int num_seqs, int row) {
  int low = 0, high = num_seqs;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace dpn::cuda
