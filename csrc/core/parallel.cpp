#include "core/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace dpn {

namespace {

// The entry points that GNU's and LLVM's OpenMP runtimes share.
struct OpenMp {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();

  Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Query max_threads = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
  Query thread_num = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  Query in_parallel = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));

  bool found() const { return parallel && max_threads && thread_num && in_parallel; }
};

const OpenMp& open_mp() {
  static const OpenMp library;
  return library;
}

struct Region {
  TaskFunction function;
  void* context;
  std::int64_t num_tasks;
  std::atomic<std::int64_t> next{0};

  void work(int thread) {
    for (std::int64_t task = next++; task < num_tasks; task = next++) function(context, task, thread);
  }
};

}  // namespace

int max_threads() {
  const OpenMp& omp = open_mp();
  if (!omp.found()) return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));  // 0: it is not known
  return omp.in_parallel() ? 1 : omp.max_threads();
}

std::int64_t tasks_for_rows(std::int64_t num_rows, std::int64_t bytes_per_row) {
  // A core reads 512 KiB in 20 to 40 microseconds. To start and end a parallel region takes a few microseconds on an
  // idle machine, but milliseconds where other processes use the cores and a thread has to wait for one. So less work
  // than this stays on one core.
  constexpr std::int64_t kSmallestRegion = 512 * 1024;
  constexpr std::int64_t kBytesPerTask = 64 * 1024;  // small enough that uneven threads finish together
  if (num_rows * bytes_per_row < kSmallestRegion) return 1;
  const std::int64_t by_size = num_rows * bytes_per_row / kBytesPerTask;
  const std::int64_t most = std::min<std::int64_t>(num_rows, 4 * max_threads());
  return std::max<std::int64_t>(1, std::min(by_size, most));
}

void run_tasks(std::int64_t num_tasks, TaskFunction function, void* context) {
  Region region{function, context, num_tasks};
  const std::int64_t threads = max_threads() < num_tasks ? max_threads() : num_tasks;
  if (threads <= 1) {
    region.work(0);
    return;
  }
  const OpenMp& omp = open_mp();
  if (omp.found()) {
    omp.parallel([](void* shared) { static_cast<Region*>(shared)->work(open_mp().thread_num()); }, &region,
                 static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::jthread> workers;
  for (int thread = 1; thread < threads; ++thread) workers.emplace_back([&region, thread] { region.work(thread); });
  region.work(0);
}

}  // namespace dpn
