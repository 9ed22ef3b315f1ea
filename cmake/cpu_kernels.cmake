# Every csrc/ops/*/*_cpu.cpp is compiled once per instruction set, each time in a namespace of its own (DPN_ISA), and
# csrc/core/cpu_isa.cpp picks one of them at run time. `portable` is built with the compiler's default target.
include(CheckCXXCompilerFlag)

file(GLOB cpu_kernel_sources CONFIGURE_DEPENDS csrc/ops/*/*_cpu.cpp)
set(DPN_CPU_KERNEL_OBJECTS "")
# Quantised products promise the same bits with every instruction set, and portable has no fused multiply-add.
file(GLOB exact_sources CONFIGURE_DEPENDS csrc/ops/quantized/*_cpu.cpp)
set_source_files_properties(${exact_sources} PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
add_library(dpn_cpu_variants INTERFACE)

function(dpn_add_cpu_variant name vector_width)
  add_library(dpn_cpu_${name} OBJECT ${cpu_kernel_sources})
  target_link_libraries(dpn_cpu_${name} PRIVATE dpn_options)
  # -fno-math-errno and -fno-trapping-math keep NaN and infinity intact and let loops vectorise.
  target_compile_options(dpn_cpu_${name} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi ${ARGN})
  target_compile_definitions(dpn_cpu_${name} PRIVATE DPN_ISA=${name} DPN_VECTOR_WIDTH=${vector_width})
  target_compile_definitions(dpn_cpu_variants INTERFACE DPN_HAS_${name})
  set(DPN_CPU_KERNEL_OBJECTS ${DPN_CPU_KERNEL_OBJECTS} $<TARGET_OBJECTS:dpn_cpu_${name}> PARENT_SCOPE)
endfunction()

dpn_add_cpu_variant(portable 4)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx512_flags -march=x86-64-v4 -mprefer-vector-width=512)
  check_cxx_compiler_flag("-march=x86-64-v3" DPN_COMPILER_HAS_V3)
  check_cxx_compiler_flag("-march=x86-64-v4" DPN_COMPILER_HAS_V4)
  check_cxx_compiler_flag("-mavx512bf16 -mavx512vnni" DPN_COMPILER_HAS_AVX512BF16)
  if(DPN_COMPILER_HAS_V3)
    dpn_add_cpu_variant(avx2 8 -march=x86-64-v3)
  endif()
  if(DPN_COMPILER_HAS_V4)
    dpn_add_cpu_variant(avx512 16 ${avx512_flags})
    if(DPN_COMPILER_HAS_AVX512BF16)
      dpn_add_cpu_variant(avx512_bf16 16 ${avx512_flags} -mavx512bf16 -mavx512vnni)
    endif()
  endif()
endif()
