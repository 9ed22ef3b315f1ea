// Global memory as blocks of one launch see it: what a block writes reaches the others only by a release and an atomic
// operation after it, and a block reads what was there before the launch until it acquires.
//
// It knows the tensors of the call alone, and leaves a launch as it is where copies of them would take too long.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace dpn::emulation {

class GlobalMemory {
 public:
  // The tensors of the next calls: `count` ranges of bytes, which may overlap.
  void set_tensors(unsigned char* const* begins, const std::int64_t* sizes, std::int64_t count);

  void begin_launch(std::size_t num_blocks);
  void end_block();
  void end_launch();

  // Others may see what the block has written so far, once it has done an atomic operation.
  void release();

  // The block sees what others have released before their atomic operations so far.
  void acquire();

  // Adds as an atomic operation: blocks see each other's additions at once.
  template <class T>
  T add(T* address, T value) {
    const T before = *address, sum = before + value;
    *address = sum;
    keep_for_all(reinterpret_cast<unsigned char*>(address), reinterpret_cast<const unsigned char*>(&sum), sizeof sum);
    return before;
  }

 private:
  // The memory itself is what the running block sees. All copies have the size of the region.
  struct Region {
    unsigned char* begin;
    std::vector<unsigned char> at_start;   // what a block sees first: memory before the launch, and atomic operations
    std::vector<unsigned char> published;  // what a block sees that acquires
    std::vector<unsigned char> seen;    // what the running block has been given; where memory differs, it has written
    std::vector<unsigned char> fenced;  // where it differs from `seen`: what the running block has released
    std::vector<unsigned char> at_end;  // after the launch

    std::array<std::vector<unsigned char>*, 5> copies() { return {&at_start, &published, &seen, &fenced, &at_end}; }
  };

  // Makes what the running block has released visible to blocks that acquire.
  void publish();

  // An atomic operation has written `value`.
  void keep_for_all(unsigned char* address, const unsigned char* value, std::size_t size);

  std::vector<Region> regions_;
  std::size_t num_bytes_ = 0;
  bool is_weak_ = false;  // of the running launch
};

GlobalMemory& global_memory();

}  // namespace dpn::emulation
