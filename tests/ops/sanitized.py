"""A pytest plugin (`-p tests.ops.sanitized`): kernels built by `cmake/sanitize.py`, which report every access out of
bounds and all undefined behaviour, take the place of `dpn_rt._kernels`. It works on import, before anything imports the
product."""

from __future__ import annotations

from tests.ops.other_kernels import load_kernels

load_kernels("sanitized-cpu")
