// How the scores of last rows are cut on the CPU. Nothing here depends on the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/attention/plan.h"

namespace dpn {

// Queries whose weights, [num_heads, keys] each, are in memory together, so that this memory has a bounded size.
struct LastRowWave {
  std::vector<DecodeTask> tasks;         // sequence: the query; those of a query follow each other
  std::vector<std::int32_t> first_task;  // [num_queries], -1 where the query is not of this wave
};

struct LastRowPlan {
  std::vector<LastRowWave> waves;
  std::int64_t keys_per_task;  // the last task of a query may have fewer
  std::int64_t head_parts;     // that the key heads of a task are divided into, so that every thread gets work
};

// lengths: keys of each query, 0 where none of its rows gets a score. key_bytes: of one key, all heads.
LastRowPlan plan_last_rows(const std::vector<std::int32_t>& lengths, std::int64_t num_heads, std::int64_t num_kv_heads,
                           std::int64_t key_bytes);

}  // namespace dpn
