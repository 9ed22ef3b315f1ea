// Compares the emulated AVX-512 instructions with the processor's own, bit by bit. Exit status 77: it has none.
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

namespace emulated {
#include "vectors.h"
}

#define WITH_AVX512 [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]]

namespace {

constexpr int kWords = 16, kRounds = 20000;

struct Vector {
  std::uint32_t words[kWords];
};

std::mt19937 random_words(std::random_device{}());

// Mostly numbers whose products are normal, and some zeros, subnormal and infinite numbers and NaN.
std::uint32_t random_float() {
  const std::uint32_t bits = random_words(), kind = random_words() % 16, sign_and_digits = bits & 0x807FFFFF;
  if (kind == 0) return bits & 0x80000000;
  if (kind == 1) return sign_and_digits;
  if (kind == 2) return random_words() % 8 ? bits & 0x80000000 : (bits & 0x80000000) | 0x7F800000;
  if (kind == 3 && random_words() % 64 == 0) return sign_and_digits | 0x7FC00000;
  return sign_and_digits | (70 + bits % 110) << 23;
}

Vector floats() {
  Vector vector;
  for (auto& word : vector.words) word = random_float();
  return vector;
}

Vector bf16_pairs() {
  Vector vector;
  for (auto& word : vector.words) word = (random_float() & 0xFFFF0000) | random_float() >> 16;
  return vector;
}

Vector bytes() {
  Vector vector;
  for (auto& word : vector.words) word = random_words() % 4 ? random_words() : 0x80FF7F00;
  return vector;
}

Vector exponents() {
  Vector vector;
  for (auto& word : vector.words) {
    const float number = static_cast<float>(static_cast<int>(random_words() % 400'000) - 200'000) / 1000;
    std::memcpy(&word, &number, sizeof number);
    if (random_words() % 16 == 0) word = 0x7FC00000;  // NaN
  }
  return vector;
}

enum class Elements { integers, floats, bf16 };

bool is_nan(std::uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }

bool equal(std::uint32_t a, std::uint32_t b, Elements elements) {
  if (elements == Elements::floats) return a == b || (is_nan(a) && is_nan(b));
  if (elements == Elements::bf16) {
    return equal(a << 16, b << 16, Elements::floats) && equal(a & 0xFFFF0000, b & 0xFFFF0000, Elements::floats);
  }
  return a == b;
}

struct Inputs {
  Vector x = floats(), y = floats(), p = bf16_pairs(), q = bf16_pairs(), a = bytes(), b = bytes(), n = exponents();
};

struct Results {
  Vector dpbf16, cvtne2ps, cvtneps, dpbusd, madd, cvtepu16, loadu_epi16, permute, shuffle, fmadd, fnmadd, min,
      roundscale, scalef, reduce;
};

// The same calls twice, since functions with and without AVX-512 cannot give each other vectors.
#define CALL_ALL                                                                                   \
  __m512 x, y, n;                                                                                  \
  __m512i a, b;                                                                                    \
  __m512bh p, q;                                                                                   \
  __m256i half;                                                                                    \
  std::memcpy(&x, &in.x, sizeof x), std::memcpy(&y, &in.y, sizeof y);                              \
  std::memcpy(&n, &in.n, sizeof n);                                                                \
  std::memcpy(&a, &in.a, sizeof a), std::memcpy(&b, &in.b, sizeof b);                              \
  std::memcpy(&p, &in.p, sizeof p), std::memcpy(&q, &in.q, sizeof q);                              \
  std::memcpy(&half, &in.a, sizeof half);                                                          \
  __m512i sum;                                                                                     \
  std::memcpy(&sum, &in.x, sizeof sum);                                                            \
  const auto dpbf16 = _mm512_dpbf16_ps(x, p, q);                                                   \
  const auto cvtne2ps = _mm512_cvtne2ps_pbh(x, y);                                                 \
  const auto cvtneps = _mm512_cvtneps_pbh(x);                                                      \
  const auto dpbusd = _mm512_dpbusd_epi32(sum, a, b);                                              \
  const auto madd = _mm512_madd_epi16(a, b);                                                       \
  const auto cvtepu16 = _mm512_maskz_cvtepu16_epi32(0xB6E5, half);                                 \
  const auto loadu_epi16 = _mm512_maskz_loadu_epi16(0x3FF, in.a.words);                            \
  const auto permute = _mm512_maskz_permute_ps(0xF7FF, x, 0x4E);                                   \
  const auto shuffle = _mm512_maskz_shuffle_f32x4(0xFFFE, x, y, 0xD8);                             \
  const auto fmadd = _mm512_fmadd_ps(x, y, x);                                                     \
  const auto fnmadd = _mm512_fnmadd_ps(x, y, y);                                                   \
  const auto min = _mm512_maskz_min_ps(0xFFFF, x, y);                                              \
  const auto roundscale = _mm512_maskz_roundscale_ps(0xFFFF, x, 0);                                \
  const auto scalef = _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ), y, n);         \
  const auto reduce = _mm512_maskz_reduce_ps(0xFFFF, x, _MM_FROUND_TO_NEG_INF);                    \
  out = {};                                                                                        \
  std::memcpy(&out.dpbf16, &dpbf16, sizeof dpbf16), std::memcpy(&out.madd, &madd, sizeof madd);    \
  std::memcpy(&out.cvtne2ps, &cvtne2ps, sizeof cvtne2ps);                                          \
  std::memcpy(&out.cvtneps, &cvtneps, sizeof cvtneps);                                             \
  std::memcpy(&out.dpbusd, &dpbusd, sizeof dpbusd);                                                \
  std::memcpy(&out.cvtepu16, &cvtepu16, sizeof cvtepu16);                                          \
  std::memcpy(&out.loadu_epi16, &loadu_epi16, sizeof loadu_epi16);                                 \
  std::memcpy(&out.permute, &permute, sizeof permute);                                             \
  std::memcpy(&out.shuffle, &shuffle, sizeof shuffle);                                             \
  std::memcpy(&out.fmadd, &fmadd, sizeof fmadd), std::memcpy(&out.fnmadd, &fnmadd, sizeof fnmadd); \
  std::memcpy(&out.min, &min, sizeof min), std::memcpy(&out.scalef, &scalef, sizeof scalef);       \
  std::memcpy(&out.roundscale, &roundscale, sizeof roundscale);                                    \
  std::memcpy(&out.reduce, &reduce, sizeof reduce);

WITH_AVX512 void run_processor(const Inputs& in, Results& out) { CALL_ALL }

}  // namespace

namespace emulated {
void run(const Inputs& in, Results& out) { CALL_ALL }
}  // namespace emulated

namespace {

bool same(const char* name, const Vector& ours, const Vector& theirs, Elements elements) {
  for (int i = 0; i < kWords; ++i) {
    if (equal(ours.words[i], theirs.words[i], elements)) continue;
    std::printf("%s: word %d is %08x, the processor's %08x\n", name, i, ours.words[i], theirs.words[i]);
    return false;
  }
  return true;
}

bool one_round() {
  const Inputs inputs;
  Results ours, theirs;
  emulated::run(inputs, ours);
  run_processor(inputs, theirs);
  return same("dpbf16", ours.dpbf16, theirs.dpbf16, Elements::floats) &&
         same("cvtne2ps", ours.cvtne2ps, theirs.cvtne2ps, Elements::bf16) &&
         same("cvtneps", ours.cvtneps, theirs.cvtneps, Elements::bf16) &&
         same("dpbusd", ours.dpbusd, theirs.dpbusd, Elements::integers) &&
         same("madd", ours.madd, theirs.madd, Elements::integers) &&
         same("cvtepu16", ours.cvtepu16, theirs.cvtepu16, Elements::integers) &&
         same("loadu_epi16", ours.loadu_epi16, theirs.loadu_epi16, Elements::integers) &&
         same("permute", ours.permute, theirs.permute, Elements::floats) &&
         same("shuffle", ours.shuffle, theirs.shuffle, Elements::floats) &&
         same("fmadd", ours.fmadd, theirs.fmadd, Elements::floats) &&
         same("fnmadd", ours.fnmadd, theirs.fnmadd, Elements::floats) &&
         same("min", ours.min, theirs.min, Elements::floats) &&
         same("roundscale", ours.roundscale, theirs.roundscale, Elements::floats) &&
         same("scalef", ours.scalef, theirs.scalef, Elements::floats) &&
         same("reduce", ours.reduce, theirs.reduce, Elements::floats);
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return 77;
  for (int round = 0; round < kRounds; ++round) {
    if (!one_round()) return 1;
  }
  return 0;
}
