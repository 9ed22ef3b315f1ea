#include "core/parallel.h"
#include "ops/reduction/score_rank.h"
#include "ops/reduction/segmented_top_k.h"

namespace dpn::DPN_ISA {

namespace {

// Finds the next digit of the cut.
Cut refine(const Cut& cut, int shift, const float* scores, std::int64_t size) {
  // Four counters per digit: most scores of an image share their first digits, and an addition to one counter has to
  // wait for the one before.
  constexpr int kApart = 4;
  std::int32_t counts_apart[kApart][kDigits] = {}, counts[kDigits];
  for (std::int64_t i = 0; i < size; ++i) {
    const std::uint32_t rank = rank_of(scores[i]);
    counts_apart[i % kApart][digit_of(rank, shift)] += has_digits(rank, cut, shift);
  }
  for (int i = 0; i < kDigits; ++i) {
    counts[i] = counts_apart[0][i] + counts_apart[1][i] + counts_apart[2][i] + counts_apart[3][i];
  }
  int digit = kDigits - 1;
  std::int32_t left = cut.count;
  for (; counts[digit] < left; --digit) left -= counts[digit];
  return {cut.rank | static_cast<std::uint32_t>(digit) << shift, left};
}

void select(const SegmentedTopKParams& p, std::int64_t segment) {
  const std::int64_t first = p.cu_scores[segment], size = p.cu_scores[segment + 1] - first;
  const std::int32_t kept = p.cu_kept[segment + 1] - p.cu_kept[segment];
  if (kept == 0) return;
  const float* scores = p.scores + first;
  std::int32_t *out = p.out + p.cu_kept[segment], *end = out + kept;
  Cut cut{0, kept};
  for (int shift = kTopShift; shift >= 0; shift -= kDigitBits) cut = refine(cut, shift, scores, size);
  for (std::int64_t i = 0; out < end; ++i) {  // no branch depends on a score: the processor could not predict it
    const std::uint32_t rank = rank_of(scores[i]);
    const int is_tie = (rank == cut.rank) & (cut.count > 0);
    *out = static_cast<std::int32_t>(i);
    out += (rank > cut.rank) | is_tie;
    cut.count -= is_tie;
  }
}

}  // namespace

// A segment is one thread's: 576 scores take a few microseconds.
void segmented_top_k_kernel(const SegmentedTopKParams& p) {
  if (p.num_segments == 0) return;
  constexpr std::int64_t kScoreBytes = 64;  // what a thread could read in the time that it takes for a score
  const std::int64_t segment_bytes = p.num_scores * kScoreBytes / p.num_segments;
  parallel_rows(p.num_segments, segment_bytes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t segment = begin; segment < end; ++segment) select(p, segment);
  });
}

}  // namespace dpn::DPN_ISA
