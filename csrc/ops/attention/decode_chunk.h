// The cached keys and values of a decode task, chunk by chunk. Include as core/simd.h.
#pragma once

#include "ops/attention/attention.h"

namespace dpn::DPN_ISA {

constexpr int kGroupKeys = 16;   // keys of one KV block whose scores are computed together
constexpr int kChunkGroups = 8;  // groups between two updates of the running maximum
constexpr int kChunkKeys = kGroupKeys * kChunkGroups;

// Groups have up to kGroupKeys rows; offsets are those of head 0 in the cache.
struct Chunk {
  std::int64_t offsets[kChunkGroups];
  int counts[kChunkGroups];
  int num_groups = 0;
};

// Rows of a group in the cache, and of the group that is read in its place after this chunk, to prefetch them; after
// the last chunk that is this group's values.
template <class T>
struct CachedGroup {
  const T* keys;
  const T* values;
  const T* next_keys;
  const T* next_values;
  int count;
};

// Visits the keys of a task, one chunk after another, and within a chunk one head after another: then the memory that
// the processor prefetches after a head's rows of a KV block is the next head's and is used.
template <class T>
class CachedKeys {
 public:
  CachedKeys(const AttentionDecodeParams& p, const DecodeTask& task)
      : p_(p),
        blocks_(p.paged.block_table + task.sequence * p.paged.max_blocks),
        last_key_(task.last_key),
        key_(task.first_key),
        entry_(key_ / p.paged.block_size),
        row_(key_ % p.paged.block_size) {
    const std::int64_t plane = p.num_kv_heads * p.paged.block_size * p.head_dim;
    keys_ = static_cast<const T*>(p.paged.kv_cache) + p.paged.layer_in_block * 2 * plane;
    values_ = keys_ + plane;
    block_stride_ = p.paged.layers_per_block * 2 * plane;
  }

  // Calls attend(kv_head, groups, num_groups).
  template <class Attend>
  void for_each_chunk(const Attend& attend) {
    Chunk chunks[2];
    find(chunks[0]);
    CachedGroup<T> groups[kChunkGroups];
    for (int turn = 0; chunks[turn].num_groups > 0; turn ^= 1) {
      find(chunks[turn ^ 1]);
      for (std::int64_t kv_head = 0; kv_head < p_.num_kv_heads; ++kv_head) {
        place(groups, kv_head, chunks[turn], chunks[turn ^ 1]);
        attend(kv_head, groups, chunks[turn].num_groups);
      }
    }
  }

 private:
  // Finds the next groups, up to kChunkGroups of them; none at the end.
  void find(Chunk& chunk) {
    int g = 0;
    for (; g < kChunkGroups && key_ < last_key_; ++g) {
      std::int64_t count = p_.paged.block_size - row_;
      if (count > last_key_ - key_) count = last_key_ - key_;
      if (count > kGroupKeys) count = kGroupKeys;
      chunk.offsets[g] = blocks_[entry_] * block_stride_ + row_ * p_.head_dim;
      chunk.counts[g] = static_cast<int>(count);
      key_ += count;
      row_ += count;
      if (row_ == p_.paged.block_size) {
        row_ = 0;
        ++entry_;
      }
    }
    chunk.num_groups = g;
  }

  void place(CachedGroup<T>* groups, std::int64_t kv_head, const Chunk& chunk, const Chunk& next_chunk) const {
    const std::int64_t head_stride = p_.paged.block_size * p_.head_dim, offset = kv_head * head_stride;
    const bool last_head = kv_head + 1 == p_.num_kv_heads;
    for (int g = 0; g < chunk.num_groups; ++g) {
      const T* keys = keys_ + chunk.offsets[g] + offset;
      const T* values = values_ + chunk.offsets[g] + offset;
      const T *next_keys = values, *next_values = values;
      if (!last_head || g < next_chunk.num_groups) {
        const std::int64_t next = last_head ? next_chunk.offsets[g] : chunk.offsets[g] + offset + head_stride;
        next_keys = keys_ + next;
        next_values = values_ + next;
      }
      groups[g] = {keys, values, next_keys, next_values, chunk.counts[g]};
    }
  }

  const AttentionDecodeParams& p_;
  const std::int32_t* blocks_;
  std::int64_t last_key_;
  std::int64_t key_;    // the first key that is in no chunk yet: it is
  std::int64_t entry_;  // in this entry of the block table, and
  std::int64_t row_;    // in this row of the block
  const T* keys_;       // keys of this layer in block 0
  const T* values_;
  std::int64_t block_stride_;
};

}  // namespace dpn::DPN_ISA
