#include "core/scratch.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

namespace dpn {

namespace {

constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
};

struct Buffer {
  std::unique_ptr<std::byte, Release> memory;
  std::int64_t bytes = 0;
};

}  // namespace

void* scratch(std::int64_t bytes) {
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    buffer.bytes = 0;
    buffer.memory.reset();  // first, so that old and new memory never exist together
    // 1.5 times the size: a sequence that grows by one row per call must not reallocate in every call.
    const std::int64_t grown = std::max(bytes + bytes / 2, std::int64_t{1} << 16);
    buffer.memory.reset(static_cast<std::byte*>(::operator new(static_cast<std::size_t>(grown), kAlignment)));
    buffer.bytes = grown;
  }
  return buffer.memory.get();
}

}  // namespace dpn
