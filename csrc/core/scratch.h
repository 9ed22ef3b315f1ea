// Working memory of kernels, kept between calls: new memory of this size would cost page faults in every call.
#pragma once

#include <cstdint>

namespace dpn {

// At least `bytes` bytes, aligned to a cache line and valid until the calling thread's next call. Contents are
// undefined. Throws std::bad_alloc. Call it outside of parallel regions. Not inline: see tasks_for_rows.
void* scratch(std::int64_t bytes);

}  // namespace dpn
