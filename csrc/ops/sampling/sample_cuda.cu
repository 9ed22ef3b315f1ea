#include "core/cuda_launch.cuh"
#include "core/cuda_reduce.cuh"
#include "core/cuda_vector.cuh"
#include "ops/sampling/sample.h"
#include "ops/sampling/sample_row.h"

namespace dpn::cuda {

namespace {

using sampling::kPivots;
using sampling::Mass;

// A block takes one row.
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kNone = 0x7FFFFFFF;
static_assert(kWarps == kWarpSize, "the last step of a reduction is one warp's");

struct Candidate {
  float logit;
  int token;  // kNone while only NaN and -infinity have been seen
};

// The larger of two logits; of equal ones the one with the lower token id.
__device__ Candidate better(Candidate a, Candidate b) {
  return b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

__device__ Candidate best_of_warp(Candidate mine) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const float logit = __shfl_xor_sync(kAllLanes, mine.logit, step);
    mine = better(mine, {logit, __shfl_xor_sync(kAllLanes, mine.token, step)});
  }
  return mine;
}

__device__ Mass warp_total(Mass value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

struct Greedy {
  Candidate best;
  bool is_finite;
};

// Every thread gets the same result. kWidth: number of logits in a load.
template <class T, int kWidth>
__device__ Greedy choose_best(const LogitRows& p) {
  __shared__ float logits[kWarps];
  __shared__ int tokens[kWarps], no_nans[kWarps];
  const T* row = static_cast<const T*>(p.logits) + blockIdx.x * p.stride;
  Candidate best{-INFINITY, kNone};
  bool no_nan = true;
  for (int first = static_cast<int>(threadIdx.x) * kWidth; first < p.vocab_size; first += kThreads * kWidth) {
    float values[kWidth];
    to_floats(values, load<kWidth>(row + first));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (values[i] > -INFINITY) best = better(best, {values[i], first + i});
      no_nan = no_nan && values[i] == values[i];
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  best = best_of_warp(best);
  const bool warp_has_no_nan = __ballot_sync(kAllLanes, no_nan) == kAllLanes;
  if (lane == 0) {
    logits[warp] = best.logit;
    tokens[warp] = best.token;
    no_nans[warp] = warp_has_no_nan;
  }
  __syncthreads();
  best = best_of_warp({logits[lane], tokens[lane]});
  const bool row_has_no_nan = __ballot_sync(kAllLanes, no_nans[lane] != 0) == kAllLanes;
  const bool is_finite = row_has_no_nan && best.token != kNone && best.logit < INFINITY;
  if (best.token == kNone) best.token = 0;
  return {best, is_finite};
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) sample_greedy_kernel(const __grid_constant__ SampleGreedyParams p) {
  const Greedy greedy = choose_best<T, kWidth>(p.rows);
  if (threadIdx.x == 0) p.tokens[blockIdx.x] = greedy.is_finite ? greedy.best.token : -1;
}

// The depths of the block's row; a load has kWidth of them. Every thread gets the same results.
template <int kWidth>
struct Depths {
  std::int32_t* depths;
  int vocab_size;
  Mass (*partial)[kWarps];  // [kPivots][kWarps] of shared memory

  // amounts[i]: the sum of amount(depth) over the tokens whose depth is below limits[i].
  template <class Amount>
  __device__ void sum_below(const std::uint32_t (&limits)[kPivots], Mass (&amounts)[kPivots],
                            const Amount& amount) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int i = 0; i < kPivots; ++i) amounts[i] = 0;
    for (int first = static_cast<int>(threadIdx.x) * kWidth; first < vocab_size; first += kThreads * kWidth) {
      const Vector<std::int32_t, kWidth> vector = load<kWidth>(depths + first);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        const auto depth = static_cast<std::uint32_t>(vector.elements[v]);
        const Mass mine = amount(depth);
#pragma unroll
        for (int i = 0; i < kPivots; ++i) amounts[i] += depth < limits[i] ? mine : 0;
      }
    }
    __syncthreads();  // threads may still be reading the previous sums
#pragma unroll
    for (int i = 0; i < kPivots; ++i) {
      const Mass total = warp_total(amounts[i]);
      if (lane == 0) partial[i][warp] = total;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPivots; ++i) amounts[i] = warp_total(partial[i][lane]);
  }

  // The first token, by id, at which the sum of amount(depth, token) exceeds `target`. Every warp sums a part of the
  // row. Then the warp whose part has the token goes through its part once more, in order.
  template <class Amount>
  __device__ int find(Mass target, const Amount& amount) const {
    __shared__ int found;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int size = (vocab_size + kThreads - 1) / kThreads * kWarpSize;
    const int begin = min(warp * size, vocab_size), end = min(begin + size, vocab_size);
    Mass sum = 0;
    for (int token = begin + lane; token < end; token += kWarpSize) sum += amount_of(token, amount);
    sum = warp_total(sum);
    __syncthreads();
    if (threadIdx.x == 0) found = vocab_size - 1;
    if (lane == 0) partial[0][warp] = sum;
    __syncthreads();
    const Mass before = warp_total(lane < warp ? partial[0][lane] : 0);
    if (before <= target && target < before + sum) {
      const int token = find_in_order(begin, end, target - before, amount);
      if (lane == 0) found = token;
    }
    __syncthreads();
    return found;
  }

 private:
  template <class Amount>
  __device__ Mass amount_of(int token, const Amount& amount) const {
    return amount(static_cast<std::uint32_t>(depths[token]), token);
  }

  template <class Amount>
  __device__ int find_in_order(int begin, int end, Mass target, const Amount& amount) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    Mass before = 0;
    for (int first = begin; first < end; first += kWarpSize) {
      Mass sum = first + lane < end ? amount_of(first + lane, amount) : 0;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const Mass lower = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += lower;
      }
      const unsigned over = __ballot_sync(kAllLanes, before + sum > target);
      if (over != 0) return first + __ffs(static_cast<int>(over)) - 1;
      before += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
    }
    return end - 1;
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams p) {
  constexpr int kDepthWidth = kWidth == 1 ? 1 : kWidest<std::int32_t>;
  __shared__ Mass partial[kPivots][kWarps];
  const std::int64_t index = blockIdx.x;
  const int vocab_size = static_cast<int>(p.rows.vocab_size);
  const Greedy greedy = choose_best<T, kWidth>(p.rows);
  const float temperature = p.temperatures[index];
  int chosen = greedy.best.token;
  if (temperature >= sampling::kMinTemperature && greedy.is_finite) {
    const Depths<kDepthWidth> row{p.depths + index * vocab_size, vocab_size, partial};
    const T* logits = static_cast<const T*>(p.rows.logits) + index * p.rows.stride;
    const float most = sampling::deepest(p.min_p[index]);
    for (int token = static_cast<int>(threadIdx.x); token < vocab_size; token += kThreads) {
      row.depths[token] =
          static_cast<std::int32_t>(sampling::depth_of(to_float(logits[token]), greedy.best.logit, temperature, most));
    }
    __syncthreads();
    const sampling::Kept kept = sampling::cut(
        p.top_k[index], p.top_p[index], vocab_size,
        [&](const auto& limits, auto& amounts) {
          row.sum_below(limits, amounts, [](std::uint32_t) { return Mass{1}; });
        },
        [&](const auto& limits, auto& amounts) {
          row.sum_below(limits, amounts, [](std::uint32_t depth) { return sampling::mass_of(depth); });
        });
    // Of the tokens at the border, those with the lowest ids are kept.
    const auto is_tie = [&](std::uint32_t depth) { return depth >= kept.low && depth < kept.high; };
    int last_tie = -1;
    if (kept.num_ties > 0) {
      last_tie =
          row.find(static_cast<Mass>(kept.num_ties - 1), [&](std::uint32_t depth, int) { return Mass{is_tie(depth)}; });
    }
    const double number =
        sampling::uniform(static_cast<std::uint64_t>(p.keys[index]), static_cast<std::uint64_t>(p.positions[index]));
    chosen = row.find(sampling::drawn(number, kept.mass), [&](std::uint32_t depth, int token) {
      return depth < kept.low || (is_tie(depth) && token <= last_tie) ? sampling::mass_of(depth) : 0;
    });
  }
  if (threadIdx.x != 0) return;
  p.tokens[index] = chosen;
  p.is_finite[index] = greedy.is_finite;
}

template <class T>
bool is_wide(const LogitRows& p) {
  return p.vocab_size % kWidest<T> == 0 && is_aligned(p.logits) && is_aligned_stride(p.stride, p.dtype);
}

dim3 grid_of(const LogitRows& p) { return dim3(static_cast<unsigned>(p.num_rows)); }

}  // namespace

void sample_greedy_kernel(const SampleGreedyParams& p, Stream stream) {
  dispatch_float(p.rows.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = is_wide<T>(p.rows) ? sample_greedy_kernel<T, kWidest<T>> : sample_greedy_kernel<T, 1>;
    launch("sample_greedy", kernel, grid_of(p.rows), dim3(kThreads), 0, stream, p);
  });
}

void sample_kernel(const SampleParams& p, Stream stream) {
  dispatch_float(p.rows.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = is_wide<T>(p.rows) && is_aligned(p.depths);
    const auto kernel = wide ? sample_kernel<T, kWidest<T>> : sample_kernel<T, 1>;
    launch("sample", kernel, grid_of(p.rows), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace dpn::cuda
