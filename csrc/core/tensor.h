// A tensor as a kernel sees it: a pointer and its layout. It owns no memory and does not depend on Python or torch.
#pragma once

#include <cstdint>
#include <optional>

namespace dpn {

enum class DType : std::uint8_t { f32, bf16, f16, i32, i64, f64, u8, i8, f8e4m3, other };
enum class Device : std::uint8_t { cpu, cuda, other };

constexpr int kMaxDims = 8;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::other;
  Device device = Device::other;
  std::int32_t device_index = 0;
  std::int32_t ndim = 0;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};  // in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

// An argument that may be left out: None in Python.
using OptionalTensor = std::optional<Tensor>;

template <class T>
T* as_or_null(const OptionalTensor& t) {
  return t ? t->as<T>() : nullptr;
}

const char* name(DType dtype);
const char* name(Device device);

}  // namespace dpn
