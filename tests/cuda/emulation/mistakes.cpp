// Small kernels with a mistake each, which the emulation must find, and the same without.
#include <stdexcept>
#include <string>

#include "core/cuda_launch.cuh"
#include "core/cuda_ptx.cuh"
#include "core/tensor.h"

namespace dpn::cuda {

namespace {

constexpr int kThreads = 64;

// How the last block of a launch gets to know what the others have written.
enum class Order { acq_rel, fences, no_release, no_acquire, fence_before_the_barrier, no_barrier };

unsigned count(std::uint32_t* finished, Order order) {
  if (order == Order::acq_rel || order == Order::no_barrier) return add_acq_rel(finished, 1u);
  if (order != Order::no_release) __threadfence();
  const unsigned before = atomicAdd(finished, 1u);
  if (order != Order::no_acquire) __threadfence();
  return before;
}

// Every thread of a block writes a number, and the last block adds them all up.
void sum_of_blocks_kernel(float* parts, float* sum, std::uint32_t* finished, Order order) {
  __shared__ bool is_last;
  const unsigned thread = threadIdx.x;
  const bool is_first = thread == 0;
  if (order == Order::fence_before_the_barrier && is_first) __threadfence();
  parts[blockIdx.x * kThreads + thread] = static_cast<float>(blockIdx.x + thread);
  if (order != Order::no_barrier) __syncthreads();
  if (is_first) {
    const unsigned before = order == Order::fence_before_the_barrier ? atomicAdd(finished, 1u) : count(finished, order);
    if (order == Order::fence_before_the_barrier) __threadfence();
    is_last = before == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || !is_first) return;
  *sum = 0;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) *sum += parts[i];
}

void touch_kernel(float* x, std::int64_t index, bool writes) {
  if (threadIdx.x != 5) return;
  volatile float* const element = x + index;
  if (writes) {
    *element = 1;
  } else {
    (void)*element;
  }
}

Order order_of(const std::string& name) {
  if (name == "acq_rel") return Order::acq_rel;
  if (name == "fences") return Order::fences;
  if (name == "no_release") return Order::no_release;
  if (name == "no_acquire") return Order::no_acquire;
  if (name == "fence_before_the_barrier") return Order::fence_before_the_barrier;
  if (name == "no_barrier") return Order::no_barrier;
  throw std::invalid_argument(name);
}

template <class Function>
const char* caught(const Function& function) {
  static std::string message;
  try {
    function();
    return nullptr;
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

}  // namespace dpn::cuda

extern "C" {

// parts: [num_blocks, 64]; sum: [1]; finished: [1] int32, 0.
const char* sum_of_blocks(const dpn::Tensor* parts, const dpn::Tensor* sum, const dpn::Tensor* finished,
                          const char* order) {
  return dpn::cuda::caught([&] {
    dpn::cuda::launch("sum_of_blocks", dpn::cuda::sum_of_blocks_kernel, dim3(static_cast<unsigned>(parts->shape[0])),
                      dim3(dpn::cuda::kThreads), 0, 0, parts->as<float>(), sum->as<float>(),
                      finished->as<std::uint32_t>(), dpn::cuda::order_of(order));
  });
}

// Reads or writes element `index` of x, which may be outside.
const char* touch(const dpn::Tensor* x, std::int64_t index, bool writes) {
  return dpn::cuda::caught([&] {
    dpn::cuda::launch("touch", dpn::cuda::touch_kernel, dim3(3), dim3(dpn::cuda::kThreads), 0, 0, x->as<float>(), index,
                      writes);
  });
}

}  // extern "C"
