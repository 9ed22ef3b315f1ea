#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "faults.h"
#include "global_memory.h"

namespace dpn::emulation {

dim3 block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kMostSharedBytes = 227 * 1024;
constexpr int kMostThreads = 1024;

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;  // as many as any block had so far
  std::vector<Thread*> runnable;
  Meeting block;
  std::vector<Meeting> warps;
  int num_threads = 0, num_live = 0;
  Thread* running = nullptr;
  std::jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string op, error;
  std::vector<unsigned char> memory = std::vector<unsigned char>(kMostSharedBytes + 16);
  std::size_t shared_bytes = 0;
  std::minstd_rand random{12345};
};

Machine& machine() {
  static Machine* instance = new Machine();
  return *instance;
}

// _setjmp and _longjmp leave the signal mask alone: a switch costs nanoseconds.
__attribute__((noinline)) void give_way() {
  Machine& m = machine();
  if (!_setjmp(m.running->context)) _longjmp(m.scheduler, 1);
}

void release(Meeting& meeting) {
  Machine& m = machine();
  m.runnable.insert(m.runnable.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
  meeting.name = nullptr;
}

void release_if_complete(Meeting& block) {
  if (static_cast<int>(block.waiting.size()) == machine().num_live) release(block);
}

// A fiber serves one thread index in block after block.
void fiber() {
  Machine& m = machine();
  for (;;) {
    (*m.kernel)();
    Thread& thread = *m.running;
    if (!thread.open_copies.empty() || !thread.copy_groups.empty()) fail("a thread ended before its cp.async copies");
    thread.is_done = true;
    --m.num_live;
    release_if_complete(m.block);
    give_way();
  }
}

void create_thread() {
  Machine& m = machine();
  m.threads.push_back(std::make_unique<Thread>());
  Thread* thread = m.threads.back().get();
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  ucontext_t start, back;
  getcontext(&start);
  start.uc_stack.ss_sp = stack;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(
      &start,
      +[] {
        give_way();  // stays here until the first block
        fiber();
      },
      0);
  m.running = thread;
  if (!_setjmp(m.scheduler)) swapcontext(&back, &start);
}

// After an error the fibers stand somewhere inside a kernel: new ones are made.
[[noreturn]] void give_up(const std::string& message) {
  Machine& m = machine();
  for (auto& thread : m.threads) (void)thread.release();
  m.threads.clear();
  m.runnable.clear();
  throw std::runtime_error(m.op + ": " + message);
}

std::string where() {
  return " (block " + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
         std::to_string(block_index.z) + ")";
}

void prepare_block() {
  Machine& m = machine();
  m.num_live = m.num_threads;
  m.block = {};
  m.warps.assign(static_cast<std::size_t>(m.num_threads / kWarpSize), {});
  std::memset(shared_memory(), 0xFF, m.shared_bytes);  // NaN in every format
  m.runnable.clear();
  for (int i = 0; i < m.num_threads; ++i) {
    Thread& thread = *m.threads[static_cast<std::size_t>(i)];
    const auto linear = static_cast<unsigned>(i);
    thread.index =
        dim3(linear % block_size.x, linear / block_size.x % block_size.y, linear / block_size.x / block_size.y);
    thread.linear = i;
    thread.is_done = thread.has_counted = false;
    m.runnable.push_back(&thread);
  }
  if (m.random() % 2) std::reverse(m.runnable.begin(), m.runnable.end());  // first and last threads both come first
}

void run_block() {
  Machine& m = machine();
  prepare_block();
  while (!m.runnable.empty()) {
    // Mostly the one that became runnable last, which is in the warp that met last: warps get far ahead of each other.
    const std::size_t last = m.runnable.size() - 1;
    const std::size_t chosen = m.random() % 64 == 0 ? m.random() % m.runnable.size() : last;
    m.running = m.runnable[chosen];
    m.runnable[chosen] = m.runnable.back();
    m.runnable.pop_back();
    if (!_setjmp(m.scheduler)) _longjmp(m.running->context, 1);
    if (!m.error.empty()) give_up(std::exchange(m.error, {}) + where());
  }
  if (m.num_live > 0) {
    std::string names;
    for (const Meeting& warp : m.warps) {
      if (warp.name && names.find(warp.name) == std::string::npos) names += std::string(" ") + warp.name;
    }
    give_up("deadlock: " + std::to_string(m.num_live) + " threads wait, " + std::to_string(m.block.waiting.size()) +
            " of them at a block barrier; at warp operations:" + names + where());
  }
}

}  // namespace

Thread& current() { return *machine().running; }

void fail(const std::string& message) {
  Machine& m = machine();
  m.error = message;
  _longjmp(m.scheduler, 1);
}

void block_barrier() {
  Machine& m = machine();
  m.block.waiting.push_back(m.running);
  release_if_complete(m.block);
  give_way();
}

void warp_collective(const char* name, void* argument, void (*combine)(void* const* lanes)) {
  Machine& m = machine();
  Thread& thread = *m.running;
  Meeting& warp = m.warps[static_cast<std::size_t>(thread.linear / kWarpSize)];
  if (warp.name && std::strcmp(warp.name, name) != 0) {
    fail(std::string("lanes of a warp meet at different operations: ") + warp.name + " and " + name);
  }
  warp.name = name;
  thread.argument = argument;
  warp.waiting.push_back(&thread);
  if (warp.waiting.size() < static_cast<std::size_t>(kWarpSize)) return give_way();
  void* lanes[kWarpSize];
  for (Thread* lane : warp.waiting) lanes[lane->lane()] = lane->argument;
  combine(lanes);
  warp.waiting.pop_back();  // this thread goes on at once
  release(warp);
}

unsigned char* shared_memory() {
  auto address = reinterpret_cast<std::uintptr_t>(machine().memory.data());
  return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

std::size_t shared_memory_size() { return machine().shared_bytes; }

unsigned char* shared_bytes(std::uint32_t address, std::size_t bytes) {
  if (address % bytes != 0) fail("shared memory address " + std::to_string(address) + " is misaligned");
  if (address + bytes > machine().shared_bytes) {
    fail("shared memory address " + std::to_string(address) + " of " + std::to_string(machine().shared_bytes));
  }
  return shared_memory() + address;
}

void async_copy(unsigned char* target, const void* source) {
  if (reinterpret_cast<std::uintptr_t>(source) % 16 != 0) fail("cp.async from a misaligned address");
  std::memset(target, 0xFF, 16);
  machine().running->open_copies.push_back({target, source});
}

void async_commit() {
  Thread& thread = *machine().running;
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void async_wait(std::size_t pending) {
  auto& groups = machine().running->copy_groups;
  while (groups.size() > pending) {
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.source) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

void run_grid(const char* op, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
              const std::function<void()>& kernel) {
  Machine& m = machine();
  m.op = op;
  m.num_threads = static_cast<int>(block.x * block.y * block.z);
  if (m.num_threads < 1 || m.num_threads > kMostThreads || m.num_threads % kWarpSize != 0) {
    throw std::runtime_error(m.op + ": block of " + std::to_string(m.num_threads) + " threads");
  }
  if (dynamic_shared_bytes > kMostSharedBytes || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(m.op + ": invalid launch configuration");
  }
  m.shared_bytes = dynamic_shared_bytes;
  m.kernel = &kernel;
  while (static_cast<int>(m.threads.size()) < m.num_threads) create_thread();
  block_size = block;
  grid_size = grid;
  const FaultHandler handler;
  global_memory().begin_launch(std::size_t{grid.x} * grid.y * grid.z);
  // A GPU promises no order of blocks.
  std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  std::shuffle(order.begin(), order.end(), m.random);
  for (const std::uint64_t linear : order) {
    block_index = dim3(static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                       static_cast<unsigned>(linear / grid.x / grid.y));
    run_block();
    global_memory().end_block();
  }
  global_memory().end_launch();
}

}  // namespace dpn::emulation
