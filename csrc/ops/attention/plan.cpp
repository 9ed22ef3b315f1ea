#include "ops/attention/plan.h"

#include <algorithm>

namespace dpn {

namespace {

// Packed keys and values of a wave: half a megabyte of bf16 for each thread, which stays in the second-level caches
// while all tiles read it (of many threads each reads only some of it). More where it or what is left would have so few
// tiles that threads wait for one another, as with few rows after a long context.
constexpr std::int64_t kElementsOfThread = std::int64_t{256} << 10, kTilesOfThread = 4;
constexpr std::int64_t kMostElements = std::int64_t{8} << 20;  // 16 to 32 MiB

// Numbers of a wave's parts. They become pointers once the vectors no longer grow.
struct WaveEnd {
  std::size_t packs, tiles;
};

// Sorts tasks by work, the most work first, so that the threads finish together.
void sort_tiles(PrefillPlan& plan, std::size_t first_tile, const std::int32_t* cu_seqlens,
                const std::int32_t* context_lens, const std::int32_t* first_keys, std::int64_t group, bool causal) {
  const auto cost = [&](const TileTask& tile) {
    const std::int32_t sequence = plan.heads[static_cast<std::size_t>(tile.head)].sequence;
    const std::int64_t rows = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    const std::int64_t keys = context_lens[sequence];
    const std::int64_t last_row = std::min(tile.first_row + kTileRows, rows * group);
    const std::int64_t seen = causal ? keys - rows + (tile.first_row + last_row) / (2 * group) + 1 : keys;
    const std::int64_t hidden = first_keys ? first_keys[cu_seqlens[sequence] + tile.first_row / group] : 0;
    return (last_row - tile.first_row) * (seen - hidden);
  };
  std::stable_sort(plan.tiles.begin() + static_cast<std::ptrdiff_t>(first_tile), plan.tiles.end(),
                   [&](const TileTask& a, const TileTask& b) { return cost(a) > cost(b); });
}

}  // namespace

PrefillPlan plan_prefill(const std::int32_t* cu_seqlens, const std::int32_t* context_lens,
                         const std::int32_t* first_keys, std::int64_t num_seqs, std::int64_t num_heads,
                         std::int64_t num_kv_heads, std::int64_t head_dim, bool causal, int num_threads) {
  PrefillPlan plan;
  std::vector<WaveEnd> ends{{0, 0}};
  const std::int64_t group = num_heads / num_kv_heads;
  std::int64_t all_tiles = 0;
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t rows = cu_seqlens[s + 1] - cu_seqlens[s];
    all_tiles += num_kv_heads * ((rows * group + kTileRows - 1) / kTileRows);
  }
  std::int64_t offset = 0;
  const auto is_full = [&](std::int64_t elements) {
    const auto made = static_cast<std::int64_t>(plan.tiles.size());
    const std::int64_t of_wave = made - static_cast<std::int64_t>(ends.back().tiles), left = all_tiles - made;
    const bool are_enough = std::min(of_wave, left) >= num_threads * kTilesOfThread;
    return (are_enough && elements > num_threads * kElementsOfThread) || elements > kMostElements;
  };
  const auto end_wave = [&] {
    sort_tiles(plan, ends.back().tiles, cu_seqlens, context_lens, first_keys, group, causal);
    ends.push_back({plan.packs.size(), plan.tiles.size()});
    plan.max_elements = std::max(plan.max_elements, offset);
    offset = 0;
  };
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t rows = cu_seqlens[s + 1] - cu_seqlens[s];
    const std::int64_t keys = context_lens[s];
    const std::int64_t first_pack = first_keys && rows > 0 ? first_keys[cu_seqlens[s]] / kPackKeys * kPackKeys : 0;
    const std::int64_t elements =
        round_up(keys, kKeyPadding) * (round_up(head_dim, kHeadPadding) + round_up(head_dim, kKeyPadding));
    for (std::int64_t h = 0; h < num_kv_heads && rows > 0; ++h) {
      if (offset > 0 && is_full(offset + elements)) end_wave();
      const auto head = static_cast<std::int32_t>(plan.heads.size());
      plan.heads.push_back({static_cast<std::int32_t>(s), static_cast<std::int32_t>(h), offset});
      offset += elements;
      for (std::int64_t key = first_pack; key < keys; key += kPackKeys) {
        plan.packs.push_back({head, static_cast<std::int32_t>(key)});
      }
      for (std::int64_t row = 0; row < rows * group; row += kTileRows) plan.tiles.push_back({head, row});
    }
  }
  if (offset > 0) end_wave();
  for (std::size_t w = 0; w + 1 < ends.size(); ++w) {
    plan.waves.push_back({plan.heads.data(), plan.packs.data() + ends[w].packs, plan.tiles.data() + ends[w].tiles,
                          static_cast<std::int64_t>(ends[w + 1].packs - ends[w].packs),
                          static_cast<std::int64_t>(ends[w + 1].tiles - ends[w].tiles)});
  }
  return plan;
}

DecodePlan plan_decode(const std::int32_t* context_lens, const std::int32_t* first_keys, std::int64_t num_seqs,
                       int num_threads) {
  // Up to eight tasks per thread, so that threads finish together although memory serves them unevenly. Fewer where
  // they would be short: the first keys of a task come slowly.
  constexpr std::int64_t kUncut = 64, kWorthwhile = 128, kMostPerThread = 8, kRounding = 16;
  const auto first_key = [&](std::int64_t s) -> std::int64_t { return first_keys ? first_keys[s] : 0; };
  std::int64_t keys = 0;
  for (std::int64_t s = 0; s < num_seqs; ++s) keys += context_lens[s] - first_key(s);
  const std::int64_t per_thread = std::clamp<std::int64_t>(keys / (kWorthwhile * num_threads), 1, kMostPerThread);
  const std::int64_t split = std::max(kUncut, (keys + num_threads * per_thread - 1) / (num_threads * per_thread));
  DecodePlan plan;
  plan.first_task.push_back(0);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const std::int64_t end = context_lens[s], length = end - first_key(s);
    const std::int64_t splits = (length + split - 1) / split;
    const std::int64_t size = round_up((length + splits - 1) / splits, kRounding);
    for (std::int64_t key = first_key(s); key < end; key += size) {
      plan.tasks.push_back({static_cast<std::int32_t>(s), static_cast<std::int32_t>(key),
                            static_cast<std::int32_t>(std::min(key + size, end))});
    }
    plan.first_task.push_back(static_cast<std::int32_t>(plan.tasks.size()));
  }
  return plan;
}

}  // namespace dpn
