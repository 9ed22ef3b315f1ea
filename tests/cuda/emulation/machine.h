// A GPU of one multiprocessor that runs one block at a time, its threads as fibers. A fiber runs until it has to wait
// at a barrier or a warp collective; which one runs next is partly random.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
};

namespace dpn::emulation {

constexpr int kWarpSize = 32;

struct AsyncCopy {
  unsigned char* target;  // 16 bytes of shared memory
  const void* source;     // null: zeros
};

struct Thread {
  dim3 index;
  int linear;  // index in the block
  std::jmp_buf context;
  bool is_done;
  bool has_counted;  // whether it has done an atomic operation
  void* argument;    // of the collective that it waits in
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups;

  int lane() const { return linear % kWarpSize; }
};

// Where threads wait for each other.
struct Meeting {
  const char* name = nullptr;  // of the operation that the first thread waits in
  std::vector<Thread*> waiting;
};

// Of the running thread.
Thread& current();
extern dim3 block_index, block_size, grid_size;

// Ends the launch with this message; callable from a thread.
[[noreturn]] void fail(const std::string& message);

void block_barrier();

// Waits for the other lanes of the warp; the last one calls combine(arguments of the 32 lanes).
void warp_collective(const char* name, void* argument, void (*combine)(void* const* lanes));

unsigned char* shared_memory();
std::size_t shared_memory_size();

// `bytes` bytes of dynamic shared memory at an address as shared_address() gives it; fails when they are out of range
// or the address is not a multiple of `bytes`.
unsigned char* shared_bytes(std::uint32_t address, std::size_t bytes);

void async_copy(unsigned char* target, const void* source);
void async_commit();
void async_wait(std::size_t pending);

void run_grid(const char* op, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
              const std::function<void()>& kernel);

}  // namespace dpn::emulation
