// How the scores of last rows are cut on the CPU. Nothing here depends on the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/attention/plan.h"

namespace dpn {

// Queries that are processed together. Their weights, [num_heads, keys] each, are in memory at once; waves bound its
// size.
struct LastRowWave {
  std::vector<DecodeTask> tasks;         // ordered by query, which is their `sequence`
  std::vector<std::int32_t> first_task;  // [num_queries], -1 where the query is in another wave
};

struct LastRowPlan {
  std::vector<LastRowWave> waves;
  std::int64_t keys_per_task;  // the last task of a query may have fewer
  std::int64_t head_parts;     // parts that the key heads of a task are divided into, so that every thread gets work
};

// lengths: [num_queries] number of keys, 0 where no row of the query gets a score. key_bytes: size of all heads of a
// key.
LastRowPlan plan_last_rows(const std::vector<std::int32_t>& lengths, std::int64_t num_heads, std::int64_t num_kv_heads,
                           std::int64_t key_bytes);

}  // namespace dpn
