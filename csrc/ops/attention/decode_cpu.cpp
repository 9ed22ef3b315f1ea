#include <cstddef>

#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/attention/attention.h"
#include "ops/attention/decode_partial.h"
#include "ops/attention/decode_vectors.h"
#if defined(__AMX_TILE__)
#include "ops/attention/decode_amx.h"
#endif

namespace dpn::DPN_ISA {

namespace {

template <class Task>
void decode(const AttentionDecodeParams& p) {
  using T = typename Task::Element;
  const std::int64_t heads = p.num_heads / p.num_kv_heads, padded_dim = round_up(p.head_dim, kRun);
  const std::int64_t head_stride = Partial::size(heads, padded_dim), task_stride = p.num_kv_heads * head_stride;
  const std::int64_t partial_bytes = round_up(p.num_tasks * task_stride * 4, 64);
  const std::int64_t task_bytes = round_up(Task::memory_bytes(p), 64);
  auto* memory = static_cast<std::byte*>(scratch(partial_bytes + max_threads() * task_bytes));
  auto* partials = reinterpret_cast<float*>(memory);
  parallel_for(p.num_tasks, [&](std::int64_t task, int thread) {
    const TaskRows<T> rows{p, p.tasks[task], partials + task * task_stride, heads, padded_dim};
    Task(rows, memory + partial_bytes + thread * task_bytes).run();
  });
  parallel_rows(p.num_seqs * p.num_heads, p.head_dim * 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t* first_task = p.first_task + i / p.num_heads;
      const Partial first(partials + first_task[0] * task_stride + i % p.num_heads / heads * head_stride, heads,
                          padded_dim);
      reduce<T>(static_cast<T*>(p.out) + i * p.head_dim, first, task_stride, first_task[1] - first_task[0], i % heads,
                heads, p.head_dim, padded_dim, p.scale * kLog2E);
    }
  });
}

}  // namespace

void attention_decode_kernel(const AttentionDecodeParams& p) {
  if (p.dtype == DType::f32) return decode<VectorTask<float>>(p);
#if defined(__AMX_TILE__)
  switch (amx_lanes(p)) {
    case 4:
      return decode<AmxTask<4>>(p);
    case 8:
      return decode<AmxTask<8>>(p);
    case 16:
      return decode<AmxTask<16>>(p);
  }
#endif
  decode<VectorTask<bf16>>(p);
}

}  // namespace dpn::DPN_ISA
