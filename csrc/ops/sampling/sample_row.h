// Filters and draws from one row of logits. All decisions are made here, so that they are the same on the CPU and on
// the GPU, whose kernels only count. Nothing is sorted: the limits of top-k and top-p are found by bisection.
//
// The depth of a token is (largest logit - logit) / temperature. It is at least 0 and kept as the bits of a float: as
// integers these have the same order. A token's mass is exp(-depth) in fixed point: a sum of integers does not depend
// on the order of summation. Tokens are ranked by depth, and equal depths by id.
//
// Everything is static, so that code compiled for one instruction set of the CPU is never linked into code for another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace dpn::sampling {

using Mass = std::uint64_t;

constexpr float kMassOfBest = 4398046511104.0f;      // 2^42
constexpr std::int64_t kMostTokens = 1 << 21;        // their masses sum up to 2^63 at most
constexpr std::uint32_t kDropped = 0x7F800000u;      // infinity: no mass
constexpr std::uint32_t kEverything = kDropped + 1;  // above every depth
constexpr int kPivots = 3;                           // limits counted in one pass, which finds two bits
constexpr float kMinTemperature = 1e-5f;             // below this a row is greedy

template <class To, class From>
DPN_DEVICE static inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

// Tokens with a depth above `most` are dropped (min-p).
DPN_DEVICE static inline std::uint32_t depth_of(float logit, float largest, float temperature, float most) {
  const float depth = (largest - logit) / temperature;
  return depth > most ? kDropped : bits<std::uint32_t>(depth);
}

DPN_DEVICE static inline Mass mass_of(std::uint32_t depth) {
  return static_cast<Mass>(expf(-bits<float>(depth)) * kMassOfBest);
}

// The largest depth that min-p keeps.
DPN_DEVICE static inline float deepest(float min_p) { return -logf(min_p); }

// Random number in [0, 1) that depends only on key and position: SplitMix64 at index `position`.
DPN_DEVICE static inline double uniform(std::uint64_t key, std::uint64_t position) {
  std::uint64_t state = key + (position + 1) * 0x9E3779B97F4A7C15u;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>((state ^ (state >> 31)) >> 11) * 0x1p-53;
}

// The tokens that are kept: those with a depth below `low`, and the first `num_ties` of those from `low` to below
// `high`, which all have the same depth.
struct Kept {
  std::uint32_t low = kDropped;
  std::uint32_t high = kEverything;
  std::int64_t num_ties = 0;
  Mass mass = 0;  // of all kept tokens
};

// The lowest depth up to which the amount of tokens or of mass reaches what is needed.
struct Border {
  std::uint32_t low, high;  // high = low + 1
  Mass below;               // the amount at depths below `low`
};

// below(limits, amounts): sets amounts[i] to the amount at depths below limits[i]. The amount below `high` must be at
// least `needed`, which must be above 0.
template <class Below>
DPN_DEVICE static inline Border find_border(Mass needed, std::uint32_t high, const Below& below) {
  Border border{0, high, 0};
  while (border.high - border.low > 1) {
    const std::uint32_t step = (border.high - border.low + kPivots) / (kPivots + 1);
    std::uint32_t limits[kPivots];
    Mass amounts[kPivots];
    for (int i = 0; i < kPivots; ++i) {
      const std::uint32_t limit = border.low + (i + 1) * step;
      limits[i] = limit < border.high ? limit : border.high;
    }
    below(limits, amounts);
    for (int i = kPivots - 1; i >= 0; --i) {
      if (amounts[i] >= needed) border.high = limits[i];
    }
    for (int i = 0; i < kPivots; ++i) {
      if (amounts[i] < needed) {
        border.low = limits[i];
        border.below = amounts[i];
      }
    }
  }
  return border;
}

// The tokens of a row that top-k keeps, and that top-p keeps of those.
//
// count_below, mass_below: as `below` of find_border, for numbers of tokens and for their masses.
template <class Count, class Weigh>
DPN_DEVICE static inline Kept cut(std::int64_t top_k, double top_p, std::int64_t vocab_size, const Count& count_below,
                                  const Weigh& mass_below) {
  Kept kept;
  if (top_k > 0 && top_k < vocab_size) {
    const Border border = find_border(static_cast<Mass>(top_k), kEverything, count_below);
    kept = {border.low, border.high, top_k - static_cast<std::int64_t>(border.below), 0};
  }
  const std::uint32_t limits[kPivots] = {kept.low, kept.low, kept.low};
  Mass masses[kPivots];
  mass_below(limits, masses);
  kept.mass = masses[0] + static_cast<Mass>(kept.num_ties) * mass_of(kept.low);
  if (top_p < 1) {
    // A token is kept while the mass before it is below the target: these are the fewest tokens that reach the target.
    const double exact = top_p * static_cast<double>(kept.mass);
    Mass target = static_cast<Mass>(exact);
    if (static_cast<double>(target) < exact) ++target;
    target = target < 1 ? 1 : target > kept.mass ? kept.mass : target;
    const Border border = find_border(target, kept.high, mass_below);
    const Mass each = mass_of(border.low), missing = target - border.below, ties = (missing + each - 1) / each;
    kept = {border.low, border.high, static_cast<std::int64_t>(ties), border.below + ties * each};
  }
  return kept;
}

// The part of the mass that a random number in [0, 1) selects. The drawn token is the first one, by id, at which the
// sum of masses exceeds this.
DPN_DEVICE static inline Mass drawn(double number, Mass mass) {
  const Mass target = static_cast<Mass>(number * static_cast<double>(mass));
  return target < mass ? target : mass - 1;
}

}  // namespace dpn::sampling
