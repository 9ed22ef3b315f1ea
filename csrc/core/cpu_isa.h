// Chooses the instruction set of the CPU kernels, once, by cpuid.
#pragma once

namespace dpn {

enum class CpuIsa { portable, avx2, avx512, avx512_bf16 };

// The best instruction set that this build and this processor have, or the one that the environment variable
// DPN_RT_CPU_ISA names (portable, avx2, avx512, avx512_bf16). Throws std::runtime_error if that one cannot run here.
CpuIsa cpu_isa();

const char* name(CpuIsa isa);
bool is_available(CpuIsa isa);

}  // namespace dpn

// Declares a kernel in the namespace of every instruction set.
#define DPN_DECLARE_CPU_KERNEL(kernel, Params) \
  namespace dpn::portable {                    \
  void kernel(const Params&);                  \
  }                                            \
  namespace dpn::avx2 {                        \
  void kernel(const Params&);                  \
  }                                            \
  namespace dpn::avx512 {                      \
  void kernel(const Params&);                  \
  }                                            \
  namespace dpn::avx512_bf16 {                 \
  void kernel(const Params&);                  \
  }

#ifdef DPN_HAS_avx2
#define DPN_CASE_avx2(kernel, params) \
  case CpuIsa::avx2:                  \
    return avx2::kernel(params);
#else
#define DPN_CASE_avx2(kernel, params)
#endif
#ifdef DPN_HAS_avx512
#define DPN_CASE_avx512(kernel, params) \
  case CpuIsa::avx512:                  \
    return avx512::kernel(params);
#else
#define DPN_CASE_avx512(kernel, params)
#endif
#ifdef DPN_HAS_avx512_bf16
#define DPN_CASE_avx512_bf16(kernel, params) \
  case CpuIsa::avx512_bf16:                  \
    return avx512_bf16::kernel(params);
#else
#define DPN_CASE_avx512_bf16(kernel, params)
#endif

// Calls the kernel of the chosen instruction set.
#define DPN_CALL_CPU_KERNEL(kernel, params)                                                                    \
  switch (cpu_isa()) {                                                                                         \
    DPN_CASE_avx512_bf16(kernel, params) DPN_CASE_avx512(kernel, params) DPN_CASE_avx2(kernel, params) default \
        : return portable::kernel(params);                                                                     \
  }
