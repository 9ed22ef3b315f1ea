// Chooses the instruction set of the CPU kernels by cpuid, once. For the few ops where a newer one may be slower,
// another one can be set.
#pragma once

namespace dpn {

// From the oldest to the newest. avx512_vnni has kernels of its own for quantised products only, amx for these and for
// attention in bfloat16; all other kernels are those of its base.
enum class CpuIsa { portable, avx2, avx512, avx512_vnni, avx512_bf16, amx };
constexpr CpuIsa kCpuIsas[] = {CpuIsa::portable,    CpuIsa::avx2,        CpuIsa::avx512,
                               CpuIsa::avx512_vnni, CpuIsa::avx512_bf16, CpuIsa::amx};

// The best instruction set that this build and this processor have, or the one that the environment variable
// DPN_RT_CPU_ISA names. Throws std::runtime_error if that one cannot run here.
CpuIsa cpu_isa();

const char* name(CpuIsa isa);
bool is_available(CpuIsa isa);

constexpr CpuIsa base_of(CpuIsa isa) {
  return isa == CpuIsa::amx ? CpuIsa::avx512_bf16 : isa == CpuIsa::avx512_vnni ? CpuIsa::avx512 : isa;
}

// Ops that may use another instruction set than cpu_isa(). Products of bfloat16 pairs (AVX512-BF16) are faster than
// float32 ones on some processors, and slower on others.
enum class TunedOp { attention, attention_decode, attention_decode_grouped, linear };
constexpr TunedOp kTunedOps[] = {TunedOp::attention, TunedOp::attention_decode, TunedOp::attention_decode_grouped,
                                 TunedOp::linear};

const char* name(TunedOp op);
// cpu_isa(), unless another one was set.
CpuIsa cpu_isa(TunedOp op);
// Throws std::invalid_argument if the instruction set cannot run here.
void set_cpu_isa(TunedOp op, CpuIsa isa);

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
  namespace dpn::avx512_vnni {                 \
  void kernel(const Params&);                  \
  }                                            \
  namespace dpn::avx512_bf16 {                 \
  void kernel(const Params&);                  \
  }                                            \
  namespace dpn::amx {                         \
  void kernel(const Params&);                  \
  }

// Each calls the kernel of one instruction set and returns, if that one is asked for.
#ifdef DPN_HAS_avx2
#define DPN_TRY_avx2(isa, kernel, params) \
  if (isa == CpuIsa::avx2) return avx2::kernel(params);
#else
#define DPN_TRY_avx2(isa, kernel, params)
#endif
#ifdef DPN_HAS_avx512
#define DPN_TRY_avx512(isa, kernel, params) \
  if (isa == CpuIsa::avx512) return avx512::kernel(params);
#else
#define DPN_TRY_avx512(isa, kernel, params)
#endif
#ifdef DPN_HAS_avx512_vnni
#define DPN_TRY_avx512_vnni(isa, kernel, params) \
  if (isa == CpuIsa::avx512_vnni) return avx512_vnni::kernel(params);
#else
#define DPN_TRY_avx512_vnni(isa, kernel, params)
#endif
#ifdef DPN_HAS_avx512_bf16
#define DPN_TRY_avx512_bf16(isa, kernel, params) \
  if (isa == CpuIsa::avx512_bf16) return avx512_bf16::kernel(params);
#else
#define DPN_TRY_avx512_bf16(isa, kernel, params)
#endif
#ifdef DPN_HAS_amx
#define DPN_TRY_amx(isa, kernel, params) \
  if (isa == CpuIsa::amx) return amx::kernel(params);
#else
#define DPN_TRY_amx(isa, kernel, params)
#endif

// Calls the kernel of an instruction set's base. Kernels that others have too try these first.
#define DPN_CALL_CPU_KERNEL_OF(isa, kernel, params)  \
  DPN_TRY_avx512_bf16(base_of(isa), kernel, params); \
  DPN_TRY_avx512(base_of(isa), kernel, params);      \
  DPN_TRY_avx2(base_of(isa), kernel, params);        \
  return portable::kernel(params);

// Calls the kernel of the chosen instruction set.
#define DPN_CALL_CPU_KERNEL(kernel, params) DPN_CALL_CPU_KERNEL_OF(cpu_isa(), kernel, params)
