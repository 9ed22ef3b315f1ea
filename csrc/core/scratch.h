// Working memory of kernels, kept between calls: fresh memory of this size would cost page faults in every call.
#pragma once

#include <cstdint>

namespace dpn {

// At least `bytes` bytes, aligned to a cache line, valid until the calling thread asks again. Contents are undefined.
// Throws std::bad_alloc. Call it outside of parallel regions. Not inline: see tasks_for_rows.
void* scratch(std::int64_t bytes);

}  // namespace dpn
