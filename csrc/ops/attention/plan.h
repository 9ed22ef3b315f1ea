// Cuts attention on the CPU into tasks. Nothing here depends on the instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace dpn {

constexpr std::int64_t kKeyPadding = 64;   // a multiple of every instruction set's panel width
constexpr std::int64_t kHeadPadding = 32;  // elements of a head's packed keys: a multiple of every kernel's kDepth
constexpr std::int64_t kTileRows = 96;     // query rows of a prefill task: a multiple of the micro-kernel's rows
constexpr std::int64_t kPackKeys = 256;    // keys that a packing task copies
constexpr std::int64_t kKeyBlock = 512;  // keys that a tile goes through at once: K and V of 64 wide heads fill 128 KiB

// `static`: every translation unit has its own copy, since they are compiled for different instruction sets.
static constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

// The keys and values of one key/value head of one sequence, packed at `offset` (in elements) of the wave's buffer.
struct PackedHead {
  std::int32_t sequence;
  std::int32_t kv_head;
  std::int64_t offset;
};

struct PackTask {
  std::int32_t head;  // index of PackedHead
  std::int32_t first_key;
};

// Query rows of one packed head. Row r is query head r % group of new row r / group; group = num_heads / num_kv_heads.
struct TileTask {
  std::int32_t head;  // index of PackedHead
  std::int64_t first_row;
};

// Heads that are packed together and then attended to together: few enough to stay in the caches meanwhile.
struct Wave {
  const PackedHead* heads;
  const PackTask* packs;
  const TileTask* tiles;  // most work first
  std::int64_t num_packs;
  std::int64_t num_tiles;
};

struct PrefillPlan {
  std::vector<Wave> waves;
  std::int64_t max_elements = 0;  // size of the largest wave's packed heads
  // The waves point into these.
  std::vector<PackedHead> heads;
  std::vector<PackTask> packs;
  std::vector<TileTask> tiles;
};

// context_lens: [num_seqs] number of keys of each sequence, at least its number of rows.
// first_keys: [num_tokens] first key that each row sees, or null.
PrefillPlan plan_prefill(const std::int32_t* cu_seqlens, const std::int32_t* context_lens,
                         const std::int32_t* first_keys, std::int64_t num_seqs, std::int64_t num_heads,
                         std::int64_t num_kv_heads, std::int64_t head_dim, bool causal, int num_threads);

// Keys [first_key, last_key) of one sequence, for all of its heads.
struct DecodeTask {
  std::int32_t sequence;
  std::int32_t first_key;
  std::int32_t last_key;
};

struct DecodePlan {
  std::vector<DecodeTask> tasks;         // in the order of sequences
  std::vector<std::int32_t> first_task;  // [num_seqs + 1]
};

// first_keys: [num_seqs] first key that each row sees, or null.
DecodePlan plan_decode(const std::int32_t* context_lens, const std::int32_t* first_keys, std::int64_t num_seqs,
                       int num_threads);

}  // namespace dpn
