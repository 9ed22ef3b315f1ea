// Whether this process may use AMX.
#pragma once

namespace dpn {

// True where the processor has tiles and their int8 and bf16 products, and the operating system saves the tiles and
// lets this process use them. It is asked for that once; a kernel or virtual machine without AMX says no.
bool has_amx();

}  // namespace dpn
