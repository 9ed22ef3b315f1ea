# Compiles every csrc/**/*.cu once, where there is a CUDA compiler. DPN_CUDA_OBJECTS and dpn_cuda hold what the
# extension links; both are empty without CUDA.
set(DPN_RT_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE DPN_RT_CUDA PROPERTY STRINGS AUTO ON OFF)
set(DPN_RT_CUDA_ARCHITECTURES "" CACHE STRING
    "As CMAKE_CUDA_ARCHITECTURES; empty: the GPUs of this machine, or 80 and 90a-real where there is none")
set(DPN_RT_HEAD_DIMS "16;32;64;96;128" CACHE STRING
    "Head sizes that attention is built for on GPUs: multiples of 16 from 16 to 128")

foreach(head_dim IN LISTS DPN_RT_HEAD_DIMS)
  math(EXPR remainder "${head_dim} % 16")
  if(NOT remainder EQUAL 0 OR head_dim LESS 16 OR head_dim GREATER 128)
    message(FATAL_ERROR "DPN_RT_HEAD_DIMS has ${head_dim}, expected multiples of 16 from 16 to 128")
  endif()
endforeach()
# For the bindings too, which tell Python the list. nvcc takes what stands after a comma for another definition.
list(JOIN DPN_RT_HEAD_DIMS "," head_dims)
list(JOIN DPN_RT_HEAD_DIMS "\\," head_dims_for_nvcc)
target_compile_definitions(dpn_options INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:DPN_CUDA_HEAD_DIMS=${head_dims}>"
  "$<$<COMPILE_LANGUAGE:CUDA>:DPN_CUDA_HEAD_DIMS=${head_dims_for_nvcc}>")

set(DPN_CUDA_OBJECTS "")
add_library(dpn_cuda INTERFACE)
if(NOT DPN_RT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DPN_RT_CUDA is '${DPN_RT_CUDA}', expected AUTO, ON or OFF")
endif()
if(DPN_RT_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(DPN_RT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DPN_RT_CUDA is ON, but no CUDA compiler was found: put nvcc on the PATH or set CUDACXX")
  endif()
  message(STATUS "dpn_rt: no CUDA compiler, building for the CPU only")
  return()
endif()

# sm_80 code runs on every 8.x GPU, and its PTX is compiled by the driver of GPUs newer than 9.0. Code for 90a runs on
# 9.0 alone and has no PTX that others could take, so it is never the only one.
function(dpn_find_cuda_architectures result)
  set(found "")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities RESULT_VARIABLE status ERROR_QUIET)
  if(status STREQUAL "0")
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" architecture "${capability}")
      if(architecture STREQUAL "90")
        set(architecture 90a-real)
      endif()
      list(APPEND found ${architecture})
    endforeach()
    list(REMOVE_DUPLICATES found)
  endif()
  if(NOT found)
    set(found 80 90a-real)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

if(DPN_RT_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "${DPN_RT_CUDA_ARCHITECTURES}")
else()
  dpn_find_cuda_architectures(CMAKE_CUDA_ARCHITECTURES)
endif()

enable_language(CUDA)
# CMake 3.24 and 3.25 do not know that nvcc takes C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
find_package(CUDAToolkit REQUIRED)
message(STATUS "dpn_rt: CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

add_library(dpn_cuda_options INTERFACE)
target_link_libraries(dpn_cuda_options INTERFACE dpn_options)
target_compile_definitions(dpn_cuda_options INTERFACE DPN_HAS_CUDA)
target_compile_options(dpn_cuda_options INTERFACE -Xcompiler=-Wall,-Wextra
  $<$<BOOL:${DPN_RT_WARNINGS_AS_ERRORS}>:-Werror=all-warnings>)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/core/*.cu csrc/ops/*/*_cuda.cu)
add_library(dpn_cuda_kernels OBJECT ${cuda_sources})
target_link_libraries(dpn_cuda_kernels PRIVATE dpn_cuda_options)
set(DPN_CUDA_OBJECTS $<TARGET_OBJECTS:dpn_cuda_kernels>)
foreach(head_dim IN LISTS DPN_RT_HEAD_DIMS)
  add_library(dpn_cuda_head_dim_${head_dim} OBJECT csrc/ops/attention/head_dim.cu)
  target_compile_definitions(dpn_cuda_head_dim_${head_dim} PRIVATE DPN_HEAD_DIM=${head_dim})
  target_link_libraries(dpn_cuda_head_dim_${head_dim} PRIVATE dpn_cuda_options)
  list(APPEND DPN_CUDA_OBJECTS $<TARGET_OBJECTS:dpn_cuda_head_dim_${head_dim}>)
endforeach()

# Linked statically, so that the extension is imported where there is no CUDA, and hidden, so that torch's copy of the
# same library stays torch's.
target_compile_definitions(dpn_cuda INTERFACE DPN_HAS_CUDA)
target_link_libraries(dpn_cuda INTERFACE CUDA::cudart_static)
target_link_options(dpn_cuda INTERFACE -Wl,--exclude-libs,ALL)
