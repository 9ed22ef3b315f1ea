#include "ops/reduction/last_row_plan.h"

#include <algorithm>

#include "core/parallel.h"

namespace dpn {

namespace {

constexpr std::int64_t kSmallestTask = 64;                    // keys
constexpr std::int64_t kLargestTask = 512;                    // keys: the weights of 32 heads fill 64 KiB
constexpr std::int64_t kWaveWeights = std::int64_t{1} << 21;  // 8 MiB, unless one query has more

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

void add_tasks(LastRowWave& wave, std::int32_t query, std::int32_t length, std::int64_t keys_per_task) {
  wave.first_task[static_cast<std::size_t>(query)] = static_cast<std::int32_t>(wave.tasks.size());
  for (std::int64_t key = 0; key < length; key += keys_per_task) {
    wave.tasks.push_back({query, static_cast<std::int32_t>(key),
                          static_cast<std::int32_t>(std::min<std::int64_t>(key + keys_per_task, length))});
  }
}

}  // namespace

LastRowPlan plan_last_rows(const std::vector<std::int32_t>& lengths, std::int64_t num_heads, std::int64_t num_kv_heads,
                           std::int64_t key_bytes) {
  std::int64_t keys = 0;
  for (const std::int32_t length : lengths) keys += length;
  const std::int64_t wanted = tasks_for_rows(keys, key_bytes);
  const std::int64_t size = std::clamp(round_up(ceil_div(keys, wanted), kSmallestTask), kSmallestTask, kLargestTask);
  LastRowPlan plan{.waves = {}, .keys_per_task = size, .head_parts = 1};
  std::int64_t num_tasks = 0, weights = kWaveWeights;  // of the last wave; the first query starts a new one
  for (std::size_t query = 0; query < lengths.size(); ++query) {
    if (lengths[query] == 0) continue;
    const std::int64_t tasks = ceil_div(lengths[query], size), more = tasks * size * num_heads;
    if (weights + more > kWaveWeights) {
      plan.waves.push_back({.tasks = {}, .first_task = std::vector<std::int32_t>(lengths.size(), -1)});
      weights = 0;
    }
    add_tasks(plan.waves.back(), static_cast<std::int32_t>(query), lengths[query], size);
    weights += more;
    num_tasks += tasks;
  }
  if (num_tasks > 0) plan.head_parts = std::clamp<std::int64_t>(ceil_div(wanted, num_tasks), 1, num_kv_heads);
  return plan;
}

}  // namespace dpn
