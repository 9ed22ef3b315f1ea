#include "core/cpu_isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dpn {

namespace {

constexpr CpuIsa kAll[] = {CpuIsa::avx512_bf16, CpuIsa::avx512, CpuIsa::avx2, CpuIsa::portable};

CpuIsa choose() {
  const char* forced = std::getenv("DPN_RT_CPU_ISA");
  std::string usable;
  for (CpuIsa isa : kAll) {
    if (!is_available(isa)) continue;
    if (!forced || !*forced || std::string(forced) == name(isa)) return isa;
    usable += std::string(usable.empty() ? "" : ", ") + name(isa);
  }
  throw std::runtime_error("DPN_RT_CPU_ISA is '" + std::string(forced) + "', expected one of: " + usable);
}

}  // namespace

const char* name(CpuIsa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

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
#ifdef DPN_HAS_avx512_bf16
    case CpuIsa::avx512_bf16:
      // Every processor with AVX512-BF16 has AVX512-VNNI too; a virtual machine may hide either.
      return is_available(CpuIsa::avx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
#endif
    case CpuIsa::portable:
      return true;
    default:
      return false;
  }
}

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose();
  return chosen;
}

}  // namespace dpn
