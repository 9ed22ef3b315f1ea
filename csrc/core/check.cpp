#include "core/check.h"

#include <algorithm>
#include <cstddef>

#include "core/cuda_dispatch.h"

namespace dpn {

namespace {

std::int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::u8:
    case DType::i8:
    case DType::f8e4m3:
      return 1;
    default:
      return 8;
  }
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

std::string dims_text(std::initializer_list<Dim*> dims) {
  std::string text = "[";
  for (const Dim* dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim->name;
    if (dim->value >= 0) text += "=" + std::to_string(dim->value);
  }
  return text + "]";
}

std::string bindings_text(std::initializer_list<Dim*> dims) {
  std::string text;
  for (const Dim* dim : dims) {
    if (dim->bound_by) text += std::string(text.empty() ? " (" : ", ") + dim->name + " from " + dim->bound_by;
  }
  return text.empty() ? text : text + ")";
}

std::string device_text(Device device, std::int32_t index) {
  return device == Device::cuda ? "cuda:" + std::to_string(index) : name(device);
}

// The range of bytes that the tensor can touch: its first byte, and the one after its last. torch's strides are never
// negative.
std::pair<const std::byte*, const std::byte*> extent(const Tensor& t) {
  const auto* first = static_cast<const std::byte*>(t.data);
  if (t.numel() == 0) return {first, first};
  std::int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.strides[i];
  return {first, first + (last + 1) * element_size(t.dtype)};
}

}  // namespace

const char* name(DType dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "int32",         "int64",
                                   "float64", "uint8",    "int8",    "float8_e4m3fn", "an unsupported dtype"};
  return names[static_cast<int>(dtype)];
}

const char* name(Device device) {
  constexpr const char* names[] = {"cpu", "cuda", "an unsupported device"};
  return names[static_cast<int>(device)];
}

DTypes Checker::floats() const {
  static constexpr DTypes kCpu = {DType::f32, DType::bf16}, kCuda = {DType::f32, DType::bf16, DType::f16};
  return device_ == Device::cuda ? kCuda : kCpu;
}

DTypes Checker::attention_floats() const {
  static constexpr DTypes kCpu = {DType::f32, DType::bf16}, kCuda = {DType::bf16, DType::f16};
  return device_ == Device::cuda ? kCuda : kCpu;
}

void Checker::fail(const std::string& message) const { throw ArgumentError(std::string(kernel_) + ": " + message); }

const Checker& Checker::condition(bool ok, const std::string& message) const {
  if (!ok) fail(message);
  return *this;
}

const Checker& Checker::range(const char* what, std::int64_t value, std::int64_t low, std::int64_t high) const {
  if (value < low || value > high) {
    fail(std::string(what) + " is " + std::to_string(value) + ", expected " + std::to_string(low) + " to " +
         std::to_string(high));
  }
  return *this;
}

const Checker& Checker::tensor(const char* argument, const Tensor& t, std::initializer_list<Dim*> dims,
                               DTypes dtypes) const {
  if (t.device != device_ || (t.device == Device::cuda && t.device_index != device_index_)) {
    fail(std::string(argument) + " is on " + device_text(t.device, t.device_index) + ", expected " +
         device_text(device_, device_index_));
  }
  if (!kHasCuda && t.device == Device::cuda) {
    fail(std::string(argument) + " is on cuda, but this build has no CUDA kernels");
  }
  if (std::find(dtypes.begin(), dtypes.end(), t.dtype) == dtypes.end()) {
    std::string expected;
    for (DType dtype : dtypes) expected += std::string(expected.empty() ? "" : " or ") + name(dtype);
    fail(std::string(argument) + " has dtype " + name(t.dtype) + ", expected " + expected);
  }
  bool matches = t.ndim == static_cast<int>(dims.size());
  int i = 0;
  for (const Dim* dim : dims) {
    matches = matches && (dim->value < 0 || dim->value == t.shape[i]);
    ++i;
  }
  if (!matches) {
    fail(std::string(argument) + " has shape " + shape_text(t) + ", expected " + dims_text(dims) + bindings_text(dims));
  }
  i = 0;
  for (Dim* dim : dims) {
    if (dim->value < 0) {
      dim->value = t.shape[i];
      dim->bound_by = argument;
    }
    // A name that occurs twice in a shape ([n, n]) is bound at its first place and compared at its second.
    if (dim->value != t.shape[i])
      fail(std::string(argument) + " has shape " + shape_text(t) + ", expected " + dims_text(dims));
    ++i;
  }
  // As in torch, a tensor without elements is contiguous with any strides.
  if (t.numel() > 0 && t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1) {
    fail(std::string(argument) + " has stride " + std::to_string(t.strides[t.ndim - 1]) +
         " in its last dimension, expected 1 (call .contiguous())");
  }
  return *this;
}

const Checker& Checker::contiguous(const char* argument, const Tensor& t, std::initializer_list<Dim*> dims,
                                   DTypes dtypes) const {
  tensor(argument, t, dims, dtypes);
  if (t.numel() == 0) return *this;
  std::int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != expected) {
      fail(std::string(argument) + " of shape " + shape_text(t) + " has stride " + std::to_string(t.strides[i]) +
           " in dimension " + std::to_string(i) + ", expected " + std::to_string(expected) + " (call .contiguous())");
    }
    expected *= std::max<std::int64_t>(t.shape[i], 1);
  }
  return *this;
}

const Checker& Checker::on_cuda(const char* argument, const Tensor& t) const {
  return condition(t.device == Device::cuda, std::string(argument) + " is on " + name(t.device) + ", expected cuda");
}

const Checker& Checker::same_dtype(const char* argument, const Tensor& t, const char* other,
                                   const Tensor& other_t) const {
  if (t.dtype != other_t.dtype) {
    fail(std::string(argument) + " has dtype " + name(t.dtype) + ", expected " + name(other_t.dtype) + " as " + other);
  }
  return *this;
}

const Checker& Checker::no_overlap(const char* argument, const Tensor& t, const char* other,
                                   const Tensor& other_t) const {
  const auto [first, last] = extent(t);
  const auto [other_first, other_last] = extent(other_t);
  if (first < other_last && other_first < last) fail(std::string(argument) + " shares memory with " + other);
  return *this;
}

const Checker& Checker::no_overlap(NamedTensors written, NamedTensors read) const {
  for (const auto& [argument, t] : written) {
    for (const auto& [other, other_t] : read) no_overlap(argument, *t, other, *other_t);
  }
  return *this;
}

std::string quoted(const std::string& text) {
  constexpr std::size_t kShown = 40;
  return "'" + (text.size() <= kShown ? text : text.substr(0, kShown - 3) + "...") + "'";
}

std::string at(const char* argument, std::int64_t index) {
  return std::string(argument) + "[" + std::to_string(index) + "]";
}

namespace {

void check_rising(const Checker& check, const char* argument, const std::int32_t* offsets, std::int64_t num_seqs) {
  if (offsets[0] != 0) check.fail(at(argument, 0) + " is " + std::to_string(offsets[0]) + ", expected 0");
  for (std::int64_t i = 0; i < num_seqs; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      check.fail(at(argument, i + 1) + " is " + std::to_string(offsets[i + 1]) + ", expected at least " +
                 std::to_string(offsets[i]));
    }
  }
}

}  // namespace

void check_offsets(const Checker& check, const char* argument, const std::int32_t* offsets, std::int64_t num_seqs,
                   std::int64_t total, const char* total_name) {
  check_rising(check, argument, offsets, num_seqs);
  if (offsets[num_seqs] != total) {
    check.fail(at(argument, num_seqs) + " is " + std::to_string(offsets[num_seqs]) + ", expected " + total_name + "=" +
               std::to_string(total));
  }
}

void check_padded_offsets(const Checker& check, const char* argument, const std::int32_t* offsets,
                          std::int64_t num_seqs, std::int64_t num_tokens) {
  check_rising(check, argument, offsets, num_seqs);
  if (offsets[num_seqs] > num_tokens) {
    check.fail(at(argument, num_seqs) + " is " + std::to_string(offsets[num_seqs]) +
               ", expected at most num_tokens=" + std::to_string(num_tokens));
  }
}

void check_entries(const Checker& check, const char* argument, const std::int32_t* entries, std::int64_t count,
                   std::int64_t low, std::int64_t high) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (entries[i] < low || entries[i] > high) {
      check.fail(std::string(argument) + " has the entry " + std::to_string(entries[i]) + " at flat index " +
                 std::to_string(i) + ", expected " + std::to_string(low) + " to " + std::to_string(high));
    }
  }
}

std::int64_t packed_size(const std::string& kernel, const std::string& argument, const Tensor& offsets) {
  const Checker check(kernel.c_str());
  Dim num_offsets("num_offsets");
  check.contiguous(argument.c_str(), offsets, {&num_offsets}, {DType::i32})
      .condition(num_offsets > 0, argument + " is empty, expected at least 1 entry");
  const std::int64_t last = offsets.as<std::int32_t>()[num_offsets - 1];
  check.condition(last >= 0, argument + " ends with " + std::to_string(last) + ", expected at least 0");
  return last;
}

}  // namespace dpn
