#include "core/parallel.h"
#include "core/simd.h"
#include "ops/linear.h"

namespace dpn::DPN_ISA {

namespace {

// How the product of a weight row and an x row is accumulated: one vector of partial sums, in the order of the columns,
// whatever else is computed beside it. So a row's result depends neither on the other rows of the batch nor on how
// rows are grouped below.
template <class T>
struct Dot {
  using Packed = float;  // x is widened once, when it is packed
  using Vec = VecF;
  static constexpr int kStep = kWidth;
  static Vec load_step(const T* weight) { return load(weight); }
  static Vec load_tail(const T* weight, int count) { return load_partial(weight, count); }
  static Vec load_x(const float* x) { return load(x); }
  static float pack(T x) { return to_float(x); }
  static VecF multiply_add(VecF sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {
  using Packed = bf16;
  using Vec = __m512bh;
  static constexpr int kStep = 2 * kWidth;
  static Vec load_step(const bf16* weight) { return reinterpret_cast<Vec>(_mm512_loadu_si512(weight)); }
  static Vec load_tail(const bf16* weight, int count) {
    const auto mask = static_cast<__mmask32>((std::uint64_t{1} << count) - 1);
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, weight));
  }
  static Vec load_x(const bf16* x) { return load_step(x); }
  static bf16 pack(bf16 x) { return x; }
  static VecF multiply_add(VecF sum, Vec a, Vec b) {
    return reinterpret_cast<VecF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
};
#endif

// Rows of x that share one pass over a group of weight rows, and weight rows per group: as many sums as there are
// registers (32 with AVX-512, else 16) beside the operands.
constexpr int kMostTokens = kWidth == 16 ? 8 : 3;
constexpr int rows_per_group(int tokens) { return kWidth == 16 && tokens > 6 ? 3 : 4; }

// sums[r] = the sum of partial[r], added in the order of reduce_sum.
template <int Rows>
void reduce_sums(const VecF* partial, float* sums) {
#if defined(__AVX512F__)
  if constexpr (Rows > 1) {
    constexpr __mmask16 kAll = 0xFFFF;  // the unmasked forms warn of uninitialised values in gcc 12's own headers
    const auto a = reinterpret_cast<__m512>(partial[0]), b = reinterpret_cast<__m512>(partial[1]);
    const auto c = reinterpret_cast<__m512>(partial[2]), d = Rows > 3 ? reinterpret_cast<__m512>(partial[3]) : c;
    const __m512 ab = _mm512_maskz_shuffle_f32x4(kAll, a, b, 0x44) + _mm512_maskz_shuffle_f32x4(kAll, a, b, 0xEE);
    const __m512 cd = _mm512_maskz_shuffle_f32x4(kAll, c, d, 0x44) + _mm512_maskz_shuffle_f32x4(kAll, c, d, 0xEE);
    // Quarter q of `quads` holds four partial sums of row q.
    const __m512 quads =
        _mm512_maskz_shuffle_f32x4(kAll, ab, cd, 0x88) + _mm512_maskz_shuffle_f32x4(kAll, ab, cd, 0xDD);
    const __m512 pairs = quads + _mm512_maskz_permute_ps(kAll, quads, 0x4E);
    const __m512 total = pairs + _mm512_maskz_permute_ps(kAll, pairs, 0xB1);
    float lanes[kWidth];
    _mm512_storeu_ps(lanes, total);
    for (int r = 0; r < Rows; ++r) sums[r] = lanes[4 * r];
    return;
  }
#endif
  for (int r = 0; r < Rows; ++r) sums[r] = reduce_sum(partial[r]);
}

template <class T>
std::int64_t steps(const LinearParams& p) {
  return (p.in_features + Dot<T>::kStep - 1) / Dot<T>::kStep;
}

// A block of tokens as [steps, tokens, kStep], zeros behind the last column: what the inner loop reads is then one
// sequence. (Rows of 2048 bfloat16 would otherwise fall onto the same few lines of the first-level cache.)
template <class T>
void pack_block(const LinearParams& p, std::int64_t first_token, std::int64_t tokens) {
  using D = Dot<T>;
  auto* packed = static_cast<typename D::Packed*>(p.packed_x) + first_token * steps<T>(p) * D::kStep;
  for (std::int64_t m = 0; m < tokens; ++m) {
    const T* x = static_cast<const T*>(p.x) + (first_token + m) * p.x_stride;
    for (std::int64_t k = 0; k < p.in_features; k += D::kStep) {
      auto* target = packed + k * tokens + m * D::kStep;
      const int count = p.in_features - k < D::kStep ? static_cast<int>(p.in_features - k) : D::kStep;
      for (int i = 0; i < D::kStep; ++i) target[i] = i < count ? D::pack(x[k + i]) : typename D::Packed{};
    }
  }
}

// sums[m * Rows + r] = dot(x row m, weight row r). Every line of the group that follows is asked for while its
// counterpart here is used: rows are often one page long, so the processor's own prefetcher would start anew in each.
template <class T, int Rows, int Tokens>
void dot_group(const T* weight, const typename Dot<T>::Packed* x, std::int64_t size, float* sums) {
  using D = Dot<T>;
  VecF partial[Tokens][Rows] = {};
  std::int64_t k = 0;
  for (; k + D::kStep <= size; k += D::kStep) {
    typename D::Vec w[Rows];
    for (int r = 0; r < Rows; ++r) {
      w[r] = D::load_step(weight + r * size + k);
      __builtin_prefetch(weight + (r + Rows) * size + k, 0, 2);
    }
    for (int m = 0; m < Tokens; ++m, x += D::kStep) {
      const typename D::Vec value = D::load_x(x);
      for (int r = 0; r < Rows; ++r) partial[m][r] = D::multiply_add(partial[m][r], w[r], value);
    }
  }
  if (const int rest = static_cast<int>(size - k); rest > 0) {
    typename D::Vec w[Rows];
    for (int r = 0; r < Rows; ++r) w[r] = D::load_tail(weight + r * size + k, rest);
    for (int m = 0; m < Tokens; ++m, x += D::kStep) {
      const typename D::Vec value = D::load_x(x);
      for (int r = 0; r < Rows; ++r) partial[m][r] = D::multiply_add(partial[m][r], w[r], value);
    }
  }
  for (int m = 0; m < Tokens; ++m) reduce_sums<Rows>(partial[m], sums + m * Rows);
}

template <class T, int Rows, int Tokens>
void block_times_groups(const LinearParams& p, std::int64_t first_token, std::int64_t begin, std::int64_t end) {
  const auto* x = static_cast<const typename Dot<T>::Packed*>(p.packed_x) + first_token * steps<T>(p) * Dot<T>::kStep;
  const auto* bias = static_cast<const T*>(p.bias);
  float sums[Rows * Tokens];
  for (std::int64_t n = begin; n < end; n += Rows) {
    dot_group<T, Rows, Tokens>(static_cast<const T*>(p.weight) + n * p.in_features, x, p.in_features, sums);
    for (int m = 0; m < Tokens; ++m) {
      T* out = static_cast<T*>(p.out) + (first_token + m) * p.out_features + n;
      for (int r = 0; r < Rows; ++r) {
        out[r] = from_float<T>(bias ? sums[m * Rows + r] + to_float(bias[n + r]) : sums[m * Rows + r]);
      }
    }
  }
}

// `tokens` <= Tokens rows of x times weight rows [begin, end).
template <class T, int Tokens = kMostTokens>
void block_times_rows(const LinearParams& p, std::int64_t first_token, std::int64_t tokens, std::int64_t begin,
                      std::int64_t end) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return block_times_rows<T, Tokens - 1>(p, first_token, tokens, begin, end);
  }
  constexpr int kRows = rows_per_group(Tokens);
  const std::int64_t whole = begin + (end - begin) / kRows * kRows;
  block_times_groups<T, kRows, Tokens>(p, first_token, begin, whole);
  block_times_groups<T, 1, Tokens>(p, first_token, whole, end);
}

template <class T>
void run(const LinearParams& p) {
  const std::int64_t blocks = (p.num_tokens + kMostTokens - 1) / kMostTokens;
  const auto first_of = [&](std::int64_t block) { return p.num_tokens * block / blocks; };
  for (std::int64_t block = 0; block < blocks; ++block) {
    pack_block<T>(p, first_of(block), first_of(block + 1) - first_of(block));
  }
  // Neighbouring weight rows stay on one core, so that each streams through memory in order.
  const std::int64_t row_bytes = p.in_features * static_cast<std::int64_t>(sizeof(T));
  parallel_rows(p.out_features, row_bytes, [&](std::int64_t begin, std::int64_t end) {
    // With several blocks of tokens, few weight rows at a time: the later blocks find them in the cache.
    const std::int64_t rows_at_once = blocks > 1 ? 12 : end - begin;
    for (std::int64_t n = begin; n < end; n += rows_at_once) {
      for (std::int64_t block = 0; block < blocks; ++block) {
        block_times_rows<T>(p, first_of(block), first_of(block + 1) - first_of(block), n,
                            n + rows_at_once < end ? n + rows_at_once : end);
      }
    }
  });
}

}  // namespace

void linear_kernel(const LinearParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
