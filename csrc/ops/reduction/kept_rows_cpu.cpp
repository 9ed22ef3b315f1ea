#include "core/parallel.h"
#include "ops/reduction/kept_row.h"

namespace dpn::DPN_ISA {

void kept_rows_kernel(const KeptRowsParams& p) {
  constexpr std::int64_t kRowBytes = 64;  // what a thread could read in the time that it takes for a row
  parallel_rows(p.num_out_tokens, kRowBytes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = 0; begin < end; ++b) {
      const std::int64_t first = p.out_cu_seqlens[b], last = p.out_cu_seqlens[b + 1];
      for (; begin < last && begin < end; ++begin) {
        p.out[begin] = p.cu_seqlens[b] + kept_row(p, b, static_cast<std::int32_t>(begin - first));
      }
    }
  });
}

}  // namespace dpn::DPN_ISA
