#include "ops/reduction/advance_sequence.h"

namespace dpn::DPN_ISA {

void advance_layout_kernel(const AdvanceLayoutParams& p) {
  const int num_seqs = static_cast<int>(p.num_seqs);
  p.out_cu_seqlens[0] = 0;
  for (int b = 0; b < num_seqs; ++b) {
    p.out_cu_seqlens[b + 1] = p.out_cu_seqlens[b] + advance_sequence(p, b);
    for (int i = p.cu_router_rows[b]; i < p.cu_router_rows[b + 1]; ++i) {
      p.out_router_rows[i] = advance_router_row(p, b, i);
    }
    const int first = p.out_cu_seqlens[b];
    for (int row = first; row < p.out_cu_seqlens[b + 1]; ++row) {
      p.positions[row] = p.first_positions[b] + row - first;
      p.cache_rows[row] = p.first_cache_rows[b] + row - first;
    }
  }
  for (std::int64_t row = p.out_cu_seqlens[num_seqs]; row < p.max_tokens; ++row)
    p.positions[row] = p.cache_rows[row] = 0;
}

}  // namespace dpn::DPN_ISA
