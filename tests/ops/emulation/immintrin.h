// The AVX-512 and AMX instructions that the CPU kernels use, as plain C++ for any x86-64.
#pragma once

#include "tiles.h"
#include "vectors.h"
