// Finds the query rows of a block of prefill attention, on the device, from cu_seqlens.
#pragma once

#include <cstdint>

#include "core/cuda_reduce.cuh"

namespace dpn::cuda {

struct RowTile {
  int sequence;   // -1 if there is no such tile
  int first_row;  // of the sequence
};

// Sum and maximum of count(sequence) over the sequences of this lane.
struct Counts {
  int sum = 0;
  int highest = 0;
};

template <class Count>
__device__ Counts lane_counts(int num_seqs, const Count& count) {
  Counts counts;
  for (int s = static_cast<int>(threadIdx.x) % kWarpSize; s < num_seqs; s += kWarpSize) {
    const int one = count(s);
    counts.sum += one;
    counts.highest = max(counts.highest, one);
  }
  return counts;
}

// Tile number `index`, where tiles are ordered by their place in their sequence, the last place first. With causal
// attention the work of a tile grows with its place. So the tiles with the most work start first, and short ones fill
// the gaps at the end. Every warp of a block finds the same tile.
template <int kRows>
__device__ RowTile find_row_tile(const std::int32_t* cu_seqlens, int num_seqs, int index) {
  const auto num_tiles = [&](int s) { return (cu_seqlens[s + 1] - cu_seqlens[s] + kRows - 1) / kRows; };
  const auto tiles_from = [&](int place) {  // number of tiles of all sequences at this place or after it
    const int mine = lane_counts(num_seqs, [&](int s) { return max(num_tiles(s) - place, 0); }).sum;
    return __reduce_add_sync(kAllLanes, mine);
  };
  const Counts mine = lane_counts(num_seqs, num_tiles);
  if (index >= __reduce_add_sync(kAllLanes, mine.sum)) return {-1, 0};
  // tiles_from(low) > index >= tiles_from(high)
  int low = 0, high = __reduce_max_sync(kAllLanes, mine.highest);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tiles_from(middle) > index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  int rank = index - tiles_from(low + 1);  // index among the sequences that have a tile at this place
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int first = 0; first < num_seqs; first += kWarpSize) {
    const bool has_tile = first + lane < num_seqs && num_tiles(first + lane) > low;
    const unsigned having = __ballot_sync(kAllLanes, has_tile);
    if (const int count = __popc(having); rank >= count) {
      rank -= count;
      continue;
    }
    const bool is_chosen = has_tile && __popc(having & ((1u << lane) - 1)) == rank;
    return {first + __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_chosen))) - 1, low * kRows};
  }
  return {-1, 0};
}

}  // namespace dpn::cuda
