// Checks of kernel arguments, made before any pointer is used. A shape is written as a list of named dimensions. The
// first argument that has a dimension binds its value, and later arguments must agree. Messages are built from the
// checked values: kernel, argument, expected, actual.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/tensor.h"

namespace dpn {

struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A dimension with a name: unbound until an argument gives it a value.
struct Dim {
  const char* name;
  std::int64_t value = -1;
  const char* bound_by = nullptr;

  explicit Dim(const char* dim_name) : name(dim_name) {}
  Dim(const char* dim_name, std::int64_t fixed) : name(dim_name), value(fixed) {}
  operator std::int64_t() const { return value; }
};

using DTypes = std::initializer_list<DType>;
using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;

class Checker {
 public:
  // For a kernel that runs only on the CPU.
  explicit Checker(const char* kernel) : kernel_(kernel) {}
  // For a kernel that runs on the device of its argument `leader`; every tensor must be on that device.
  Checker(const char* kernel, const Tensor& leader)
      : kernel_(kernel),
        device_(leader.device == Device::cuda ? Device::cuda : Device::cpu),
        device_index_(leader.device == Device::cuda ? leader.device_index : 0) {}

  // Whether the content of tensors can be checked. The host never reads tensors of a GPU.
  bool can_read() const { return device_ == Device::cpu; }
  // The dtypes of activations that kernels take on this device; attention kernels take others.
  DTypes floats() const;
  DTypes attention_floats() const;

  // Shape, dtype and device; the innermost dimension must be contiguous.
  const Checker& tensor(const char* argument, const Tensor& t, std::initializer_list<Dim*> dims, DTypes dtypes) const;
  // As `tensor`, and every dimension must be contiguous.
  const Checker& contiguous(const char* argument, const Tensor& t, std::initializer_list<Dim*> dims,
                            DTypes dtypes) const;
  // For a kernel that runs only on the GPU.
  const Checker& on_cuda(const char* argument, const Tensor& t) const;
  const Checker& same_dtype(const char* argument, const Tensor& t, const char* other, const Tensor& other_t) const;
  // Two arguments must not share memory, one of which is written. The second form checks each of `written` against each
  // of `read`.
  const Checker& no_overlap(const char* argument, const Tensor& t, const char* other, const Tensor& other_t) const;
  const Checker& no_overlap(NamedTensors written, NamedTensors read) const;
  const Checker& range(const char* what, std::int64_t value, std::int64_t low, std::int64_t high) const;
  const Checker& condition(bool ok, const std::string& message) const;

  [[noreturn]] void fail(const std::string& message) const;

 private:
  const char* kernel_;
  Device device_ = Device::cpu;
  std::int32_t device_index_ = 0;
};

// A text in quotation marks, cut where it is long, for messages.
std::string quoted(const std::string& text);

// "argument[index]", for messages.
std::string at(const char* argument, std::int64_t index);

// Offsets [num_seqs + 1] of packed entries must start at 0, never fall, and end at `total`. Messages call that
// `total_name`.
void check_offsets(const Checker& check, const char* argument, const std::int32_t* offsets, std::int64_t num_seqs,
                   std::int64_t total, const char* total_name = "num_tokens");

// Offsets [num_seqs + 1] of packed rows must start at 0, never fall, and end at `num_tokens` at most: rows behind the
// last offset are padding, which a kernel leaves alone.
void check_padded_offsets(const Checker& check, const char* argument, const std::int32_t* offsets,
                          std::int64_t num_seqs, std::int64_t num_tokens);

// Each of the `count` entries must lie in [low, high].
void check_entries(const Checker& check, const char* argument, const std::int32_t* entries, std::int64_t count,
                   std::int64_t low, std::int64_t high);

// Number of entries of a packed output: the last of its `offsets` [num_parts + 1], read without making a one-element
// torch tensor. Python calls it for `kernel` on the CPU.
std::int64_t packed_size(const std::string& kernel, const std::string& argument, const Tensor& offsets);

}  // namespace dpn
