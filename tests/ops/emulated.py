"""A pytest plugin (`-p tests.ops.emulated`): kernels for AVX-512 and AMX with plain C++ for their instructions, built
from `emulation/`, take the place of `dpn_rt._kernels`. It works on import, before anything imports the product."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "emulated-cpu"

(path,) = BUILD.glob("_kernels*.so")
spec = importlib.util.spec_from_file_location("dpn_rt._kernels", path)
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
