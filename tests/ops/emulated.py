"""A pytest plugin (`-p tests.ops.emulated`): kernels for AVX-512 and AMX with plain C++ for their instructions, built
from `emulation/`, take the place of `dpn_rt._kernels`. It works on import, before anything imports the product."""

from __future__ import annotations

from tests.ops.other_kernels import load_kernels

load_kernels("emulated-cpu")
