// Scratch memory for one call of a kernel.
#pragma once

#include <cstdint>
#include <new>

namespace dpn {

class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::int64_t bytes)
      : data_(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})) {}
  ~AlignedBuffer() { ::operator delete(data_, std::align_val_t{64}); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace dpn
