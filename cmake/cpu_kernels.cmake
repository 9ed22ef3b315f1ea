# Every csrc/ops/*/*_cpu.cpp is compiled once per instruction set, each time in a namespace of its own (DPN_ISA), and
# csrc/core/cpu_isa.cpp picks one of them at run time. `portable` is built with the compiler's default target. Two
# instruction sets add to another one, and have only the kernels that use what they add.
include(CheckCXXCompilerFlag)

option(DPN_RT_EMULATED_CPU "For tests: plain C++ instead of AVX-512 and AMX instructions, for any x86-64" OFF)

file(GLOB cpu_kernel_sources CONFIGURE_DEPENDS csrc/ops/*/*_cpu.cpp)
set(DPN_CPU_KERNEL_OBJECTS "")
# Quantised products promise the same bits with every instruction set, and portable has no fused multiply-add.
file(GLOB quantized_sources CONFIGURE_DEPENDS csrc/ops/quantized/*_cpu.cpp)
set_source_files_properties(${quantized_sources} PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
file(GLOB dot_sources CONFIGURE_DEPENDS csrc/ops/quantized/linear_*_cpu.cpp)
set(tile_sources ${dot_sources} csrc/ops/attention/prefill_cpu.cpp csrc/ops/attention/decode_cpu.cpp)
add_library(dpn_cpu_variants INTERFACE)

# -fno-math-errno and -fno-trapping-math keep NaN and infinity intact and let loops vectorise.
set(cpu_flags -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi)
if(DPN_RT_EMULATED_CPU)
  list(APPEND cpu_flags -O1)
  target_compile_definitions(dpn_cpu_variants INTERFACE DPN_EMULATED_CPU)
elseif(DPN_RT_SANITIZE)
  list(APPEND cpu_flags -O1)
else()
  list(APPEND cpu_flags -O3)
endif()

function(dpn_add_cpu_variant name vector_width sources)
  add_library(dpn_cpu_${name} OBJECT ${sources})
  target_link_libraries(dpn_cpu_${name} PRIVATE dpn_options)
  target_compile_options(dpn_cpu_${name} PRIVATE ${cpu_flags} ${ARGN})
  target_compile_definitions(dpn_cpu_${name} PRIVATE DPN_ISA=${name} DPN_VECTOR_WIDTH=${vector_width})
  target_compile_definitions(dpn_cpu_variants INTERFACE DPN_HAS_${name})
  set(DPN_CPU_KERNEL_OBJECTS ${DPN_CPU_KERNEL_OBJECTS} $<TARGET_OBJECTS:dpn_cpu_${name}> PARENT_SCOPE)
endfunction()

# 16 lanes of AVX-512 with further features, named as in -m options. An emulated build compiles the same code for any
# x86-64: the features' macros are defined all the same, and tests/ops/emulation/immintrin.h has the instructions.
macro(dpn_add_avx512_variant name sources)
  set(flags -march=x86-64-v4 -mprefer-vector-width=512)
  if(DPN_RT_EMULATED_CPU)
    set(flags -I${CMAKE_SOURCE_DIR}/tests/ops/emulation -D__AVX512F__ -D__AVX512BW__)
  endif()
  foreach(feature ${ARGN})
    string(TOUPPER ${feature} macro)
    string(REPLACE - _ macro ${macro})
    list(APPEND flags $<IF:$<BOOL:${DPN_RT_EMULATED_CPU}>,-D__${macro}__,-m${feature}>)
  endforeach()
  dpn_add_cpu_variant(${name} 16 "${sources}" ${flags})
endmacro()

# No test runs the portable kernels of an emulated build.
dpn_add_cpu_variant(portable 4 "${cpu_kernel_sources}" $<$<BOOL:${DPN_RT_EMULATED_CPU}>:-O0>)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  check_cxx_compiler_flag("-march=x86-64-v3" DPN_COMPILER_HAS_V3)
  check_cxx_compiler_flag("-march=x86-64-v4 -mavx512vnni" DPN_COMPILER_HAS_V4)
  check_cxx_compiler_flag("-mavx512bf16" DPN_COMPILER_HAS_BF16)
  check_cxx_compiler_flag("-mamx-tile -mamx-int8 -mamx-bf16" DPN_COMPILER_HAS_AMX)
  if(DPN_COMPILER_HAS_V3 AND NOT DPN_RT_EMULATED_CPU)
    dpn_add_cpu_variant(avx2 8 "${cpu_kernel_sources}" -march=x86-64-v3)
  endif()
  if(DPN_COMPILER_HAS_V4)
    dpn_add_avx512_variant(avx512 "${cpu_kernel_sources}")
    dpn_add_avx512_variant(avx512_vnni "${dot_sources}" avx512vnni)
    if(DPN_COMPILER_HAS_BF16)
      dpn_add_avx512_variant(avx512_bf16 "${cpu_kernel_sources}" avx512vnni avx512bf16)
      if(DPN_COMPILER_HAS_AMX)
        dpn_add_avx512_variant(amx "${tile_sources}" avx512vnni avx512bf16 amx-tile amx-int8 amx-bf16)
      endif()
    endif()
  endif()
endif()
