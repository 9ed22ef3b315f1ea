#include "core/scratch.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

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
#ifdef __SANITIZE_ADDRESS__
  // The bytes that were not asked for count as out of bounds.
  ASAN_UNPOISON_MEMORY_REGION(buffer.memory.get(), bytes);
  ASAN_POISON_MEMORY_REGION(buffer.memory.get() + bytes, buffer.bytes - bytes);
#endif
  return buffer.memory.get();
}

}  // namespace dpn
