// Threads for CPU kernels. Work runs in the OpenMP pool that torch already uses, which is found at run time: a second
// pool of spinning threads would compete with it for the cores. Without torch's pool, plain threads are started.
#pragma once

#include <cstdint>

namespace dpn {

using TaskFunction = void (*)(void* context, std::int64_t task, int thread);

// Threads that a parallel region may use now (torch.set_num_threads is respected).
int max_threads();

// Calls function(context, task, thread) once for each task in [0, num_tasks), with thread < max_threads(). Tasks are
// handed out one by one, so that uneven tasks balance; any thread may run any task. `function` must not throw.
void run_tasks(std::int64_t num_tasks, TaskFunction function, void* context);

// The same for `body(task, thread)`. A single task runs on the calling thread.
template <class Body>
void parallel_for(std::int64_t num_tasks, const Body& body) {
  if (num_tasks == 1) {
    body(std::int64_t{0}, 0);
    return;
  }
  run_tasks(
      num_tasks,
      [](void* context, std::int64_t task, int thread) { (*static_cast<const Body*>(context))(task, thread); },
      const_cast<Body*>(&body));
}

// Number of tasks to cut `num_rows` rows of `bytes_per_row` bytes into, so that each is worth handing to a thread. It
// is not inline: a copy compiled for one instruction set could be linked into code for another.
std::int64_t tasks_for_rows(std::int64_t num_rows, std::int64_t bytes_per_row);

// Calls body(row_begin, row_end) over [0, num_rows) in parallel.
template <class Body>
void parallel_rows(std::int64_t num_rows, std::int64_t bytes_per_row, const Body& body) {
  const std::int64_t tasks = tasks_for_rows(num_rows, bytes_per_row);
  parallel_for(tasks, [&](std::int64_t task, int) { body(num_rows * task / tasks, num_rows * (task + 1) / tasks); });
}

}  // namespace dpn
