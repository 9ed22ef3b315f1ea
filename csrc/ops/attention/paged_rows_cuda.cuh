// Addresses of the keys and values of one sequence and head in the blocks of a KV cache.
#pragma once

#include "core/cuda_ptx.cuh"
#include "ops/attention/attention.h"

namespace dpn::cuda {

template <class T, int kHeadDim>
class PagedRows {
 public:
  // column: the addresses are those of this element of each row.
  __device__ PagedRows(const PagedKeys& paged, int num_kv_heads, int sequence, int kv_head, int column)
      : blocks_(paged.block_table + sequence * paged.max_blocks),
        divisor_(paged.block_divisor),
        block_size_(static_cast<int>(paged.block_size)),
        block_bytes_(static_cast<int>(paged.layers_per_block) * 2 * num_kv_heads * block_size_ * kHeadDim *
                     static_cast<int>(sizeof(T))),
        to_value_(num_kv_heads * block_size_ * kHeadDim) {
    const std::int64_t first_row =
        (paged.layer_in_block * 2 * num_kv_heads + kv_head) * static_cast<std::int64_t>(block_size_);
    keys_ = static_cast<const T*>(paged.kv_cache) + first_row * kHeadDim + column;
  }

  // The place of a row of the sequence. Reads the row's block from the table, so that several of these reads can be in
  // flight before the first is used.
  struct Place {
    std::int32_t block;
    int row;
  };

  __device__ Place place(int index) const {
    const int entry = divisor_.divide(index);
    return {blocks_[entry], index - entry * block_size_};
  }

  __device__ const T* key(const Place& place) const {
    return offset_bytes(keys_, place.block, block_bytes_) + place.row * kHeadDim;
  }

  __device__ const T* value(const T* key) const { return key + to_value_; }

 private:
  const T* keys_;  // keys of the layer and head in block 0
  const std::int32_t* blocks_;
  Divisor divisor_;
  int block_size_;
  int block_bytes_;
  int to_value_;  // number of elements from a key to its value
};

}  // namespace dpn::cuda
