#include "core/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/amx.h"

namespace dpn {

namespace {

std::string names_of_available() {
  std::string names;
  for (const CpuIsa isa : kCpuIsas) {
    if (is_available(isa)) names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  return names;
}

CpuIsa choose() {
  const char* forced = std::getenv("DPN_RT_CPU_ISA");
  CpuIsa best = CpuIsa::portable;
  for (const CpuIsa isa : kCpuIsas) {
    if (!is_available(isa)) continue;
    best = isa;
    if (forced && std::string(forced) == name(isa)) return isa;
  }
  if (!forced || !*forced) return best;
  throw std::runtime_error("DPN_RT_CPU_ISA is '" + std::string(forced) + "', expected one of: " + names_of_available());
}

// The instruction set of a tuned op; -1: cpu_isa().
std::atomic<int>& tuned(TunedOp op) {
  static std::atomic<int> isas[] = {-1, -1, -1, -1};
  return isas[static_cast<int>(op)];
}

}  // namespace

const char* name(CpuIsa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

const char* name(TunedOp op) {
  constexpr const char* names[] = {"attention", "attention_decode", "attention_decode_grouped", "linear"};
  return names[static_cast<int>(op)];
}

#ifdef DPN_EMULATED_CPU

// A build for tests, in which plain C++ stands for the instructions.
bool is_available(CpuIsa isa) { return isa != CpuIsa::avx2; }

#else

bool is_available(CpuIsa isa) {
  switch (isa) {
#ifdef DPN_HAS_avx2
    case CpuIsa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
#ifdef DPN_HAS_avx512
    case CpuIsa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512cd");
#endif
#ifdef DPN_HAS_avx512_vnni
    case CpuIsa::avx512_vnni:
      return is_available(CpuIsa::avx512) && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef DPN_HAS_avx512_bf16
    case CpuIsa::avx512_bf16:
      // Every processor with AVX512-BF16 has AVX512-VNNI too; a virtual machine may hide either.
      return is_available(CpuIsa::avx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
#endif
#ifdef DPN_HAS_amx
    case CpuIsa::amx:
      return is_available(CpuIsa::avx512_bf16) && has_amx();
#endif
    case CpuIsa::portable:
      return true;
    default:
      return false;
  }
}

#endif

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose();
  return chosen;
}

CpuIsa cpu_isa(TunedOp op) {
  const int isa = tuned(op).load(std::memory_order_relaxed);
  return isa < 0 ? cpu_isa() : static_cast<CpuIsa>(isa);
}

void set_cpu_isa(TunedOp op, CpuIsa isa) {
  if (!is_available(isa)) {
    throw std::invalid_argument("the instruction set of " + std::string(name(op)) + " is " + name(isa) +
                                ", expected one of: " + names_of_available());
  }
  tuned(op).store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace dpn
