#include "core/parallel.h"
#include "core/simd.h"
#include "ops/linear/linear.h"

namespace dpn::DPN_ISA {

namespace {

// A product of many columns is summed in parts of kSumSteps steps where a vector has 4 elements only: the sums of one
// part after the other would be long there, and lose digits.
constexpr bool kSumsInParts = kWidth == 4;
constexpr std::int64_t kSumSteps = 32;

// Accumulates the product of a weight row and a row of x: one vector of partial sums, always in the order of the
// columns. So a row's result depends neither on the other rows of the batch nor on how rows are grouped below.
template <class T>
struct Dot {
  using Packed = float;  // x is widened once, when it is packed
  using Vec = VecF;
  static constexpr int kStep = kWidth;
  static Vec load_step(const T* weight) { return load(weight); }
  static Vec load_tail(const T* weight, int count) { return load_partial(weight, count); }
  static Vec load_x(const float* x) { return load(x); }
  static void pack(float* packed, const T* x, int count) { store(packed, load_n(x, count)); }
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
  static void pack(bf16* packed, const bf16* x, int count) {
    _mm512_storeu_si512(packed, reinterpret_cast<__m512i>(count == kStep ? load_step(x) : load_tail(x, count)));
  }
  static VecF multiply_add(VecF sum, Vec a, Vec b) {
    return reinterpret_cast<VecF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
};
#endif

// Number of x rows that share one pass over a group of weight rows, and number of weight rows in a group. Their sums
// fill the registers (32 with AVX-512, else 16) that the operands leave free. With one or two tokens memory is the
// limit, and groups of eight weight rows read a sixth faster than groups of four.
constexpr int kMostTokens = kWidth == 16 ? 8 : 3;
constexpr int rows_per_group(int tokens) { return kWidth != 16 ? 4 : tokens <= 2 ? 8 : tokens <= 6 ? 4 : 3; }
constexpr int kPanelRows = 24;  // a multiple of them all

// sums[r] = the sum of partial[r], added in the order of reduce_sum.
template <int Rows>
void reduce_sums(const VecF* partial, float* sums) {
  if constexpr (Rows > 4) {
    reduce_sums<4>(partial, sums);
    return reduce_sums<Rows - 4>(partial + 4, sums + 4);
  }
#if defined(__AVX512F__)
  if constexpr (Rows > 1 && Rows <= 4) {
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

// Packs a block of tokens as [steps, tokens, kStep], with zeros after the last column, so that the inner loop reads
// memory in order. (Otherwise rows of 2048 bfloat16 would share the same few lines of the first-level cache.)
template <class T>
void pack_block(const LinearParams& p, std::int64_t first_token, std::int64_t tokens) {
  using D = Dot<T>;
  auto* packed = static_cast<typename D::Packed*>(p.packed_x) + first_token * steps<T>(p) * D::kStep;
  for (std::int64_t k = 0; k < p.in_features; k += D::kStep) {
    const int count = p.in_features - k < D::kStep ? static_cast<int>(p.in_features - k) : D::kStep;
    for (std::int64_t m = 0; m < tokens; ++m) {
      const T* x = static_cast<const T*>(p.x) + (first_token + m) * p.x_stride + k;
      D::pack(packed + k * tokens + m * D::kStep, x, count);
    }
  }
}

// A run of columns of one group of weight rows.
template <class T>
struct Columns {
  const T* weight;                   // first row, first column
  const typename Dot<T>::Packed* x;  // packed block, first column
  std::int64_t row_size;             // elements from one weight row to the next
  std::int64_t size;                 // columns
  std::int64_t lookahead;            // elements to the weights that are needed next
};

// sums[m][r] += x row m times weight row r, element by element. Prefetches the weights that are needed next: rows
// are often one page long, and the processor's own prefetcher starts anew in every page.
template <class T, int Rows, int Tokens>
void accumulate(const Columns<T>& c, VecF (*sums)[Rows]) {
  using D = Dot<T>;
  const typename D::Packed* x = c.x;
  VecF partial[Tokens][Rows] = {};
  if constexpr (!kSumsInParts) {
    for (int m = 0; m < Tokens; ++m) {
      for (int r = 0; r < Rows; ++r) partial[m][r] = sums[m][r];
    }
  }
  const auto add_part = [&] {
    for (int m = 0; m < Tokens; ++m) {
      for (int r = 0; r < Rows; ++r) {
        sums[m][r] += partial[m][r];
        partial[m][r] = VecF{};
      }
    }
  };
  const auto add = [&](const typename D::Vec* w) {
    for (int m = 0; m < Tokens; ++m, x += D::kStep) {
      const typename D::Vec value = D::load_x(x);
      for (int r = 0; r < Rows; ++r) partial[m][r] = D::multiply_add(partial[m][r], w[r], value);
    }
  };
  typename D::Vec w[Rows];
  std::int64_t k = 0;
  for (; k + D::kStep <= c.size; k += D::kStep) {
    for (int r = 0; r < Rows; ++r) {
      w[r] = D::load_step(c.weight + r * c.row_size + k);
      __builtin_prefetch(c.weight + r * c.row_size + k + c.lookahead, 0, 1);
    }
    add(w);
    if constexpr (kSumsInParts) {
      if ((k / D::kStep + 1) % kSumSteps == 0) add_part();
    }
  }
  if (const int rest = static_cast<int>(c.size - k); rest > 0) {
    for (int r = 0; r < Rows; ++r) w[r] = D::load_tail(c.weight + r * c.row_size + k, rest);
    add(w);
  }
  if constexpr (kSumsInParts) return add_part();
  for (int m = 0; m < Tokens; ++m) {
    for (int r = 0; r < Rows; ++r) sums[m][r] = partial[m][r];
  }
}

template <class T, int Rows>
void store_sums(const LinearParams& p, std::int64_t token, std::int64_t row, const VecF* partial) {
  const auto* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out) + token * p.out_features + row;
  float sums[Rows];
  reduce_sums<Rows>(partial, sums);
  for (int r = 0; r < Rows; ++r) out[r] = from_float<T>(bias ? sums[r] + to_float(bias[row + r]) : sums[r]);
}

// Multiplies a block of `Tokens` rows of x by the weight rows [begin, end), Rows at a time. With several tokens the
// columns are cut into runs, and all groups of the panel process one run before the next one, so that this run of x
// stays in the first-level cache.
template <class T, int Rows, int Tokens>
void multiply_groups(const LinearParams& p, std::int64_t first_token, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kRunSteps = 32;  // of a step's 64 bytes: 16 KiB for 8 tokens
  const std::int64_t num_steps = steps<T>(p);
  const std::int64_t most_runs = (num_steps + kRunSteps - 1) / kRunSteps;  // 0 for a weight without columns
  const std::int64_t runs = Tokens > 2 && end - begin > Rows && most_runs > 0 ? most_runs : 1;
  std::int64_t run_steps = (num_steps + runs - 1) / runs;
  if constexpr (kSumsInParts) run_steps = (run_steps + kSumSteps - 1) / kSumSteps * kSumSteps;  // parts stay whole
  const std::int64_t run_size = run_steps * Dot<T>::kStep;
  const auto* x = static_cast<const typename Dot<T>::Packed*>(p.packed_x) + first_token * num_steps * Dot<T>::kStep;
  const auto* weight = static_cast<const T*>(p.weight);
  VecF partial[kPanelRows / Rows][Tokens][Rows] = {};
  for (std::int64_t k = 0; k < p.in_features; k += run_size) {
    const bool last = k + run_size >= p.in_features;
    const std::int64_t lookahead = last ? (end - begin) * p.in_features - k : run_size;
    const std::int64_t size = last ? p.in_features - k : run_size;
    for (std::int64_t n = begin; n < end; n += Rows) {
      accumulate<T, Rows, Tokens>({weight + n * p.in_features + k, x + k * Tokens, p.in_features, size, lookahead},
                                  partial[(n - begin) / Rows]);
    }
  }
  for (std::int64_t n = begin; n < end; n += Rows) {
    for (int m = 0; m < Tokens; ++m) store_sums<T, Rows>(p, first_token + m, n, partial[(n - begin) / Rows][m]);
  }
}

// `tokens` <= Tokens rows of x times a panel, at most kPanelRows weight rows.
template <class T, int Tokens = kMostTokens>
void multiply_panel(const LinearParams& p, std::int64_t first_token, std::int64_t tokens, std::int64_t begin,
                    std::int64_t end) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return multiply_panel<T, Tokens - 1>(p, first_token, tokens, begin, end);
  }
  constexpr int kRows = rows_per_group(Tokens);
  const std::int64_t whole = begin + (end - begin) / kRows * kRows;
  multiply_groups<T, kRows, Tokens>(p, first_token, begin, whole);
  for (std::int64_t n = whole; n < end; ++n) multiply_groups<T, 1, Tokens>(p, first_token, n, n + 1);
}

template <class T>
void run(const LinearParams& p) {
  const std::int64_t blocks = (p.num_tokens + kMostTokens - 1) / kMostTokens;
  const auto first_of = [&](std::int64_t block) { return p.num_tokens * block / blocks; };
  for (std::int64_t block = 0; block < blocks; ++block) {
    pack_block<T>(p, first_of(block), first_of(block + 1) - first_of(block));
  }
  // Consecutive weight rows stay on one core, so that each core streams through memory in order. For the second block
  // of tokens a panel is in the cache.
  const std::int64_t row_bytes = p.in_features * static_cast<std::int64_t>(sizeof(T));
  parallel_rows(p.out_features, row_bytes * blocks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; n += kPanelRows) {
      const std::int64_t panel_end = n + kPanelRows < end ? n + kPanelRows : end;
      for (std::int64_t block = 0; block < blocks; ++block) {
        multiply_panel<T>(p, first_of(block), first_of(block + 1) - first_of(block), n, panel_end);
      }
    }
  });
}

}  // namespace

void linear_kernel(const LinearParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace dpn::DPN_ISA
