// Finds the sequence of a packed row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dpn::cuda {

// The sequence of a packed row below offsets[num_seqs]: the last one that starts at or before the row. It is never a
// sequence without rows.
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
