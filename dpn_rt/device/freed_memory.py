"""Whether the C library keeps memory that was freed, or gives it back to the system.

The layers of a prefill take and free the same large tensors over and over. By default glibc gives most of them back
each time, and the system clears every page that it gives again, which takes up to a sixth of a prefill in 8 bits. What
torch and oneDNN take inside of their operators comes from the C library too, so its settings cover every result.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

KEPT_BYTES = 1 << 30
"""Freed memory that is kept, at most; and the largest block that is."""
LEAST_BYTES = 32 << 20
"""glibc may keep as much by itself, and before 2.35 it can keep no larger block."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, as malloc.h numbers them."""


def keep_freed_memory(num_bytes: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Have this process keep freed memory for later, from now on.

    Args:
        num_bytes: to keep; of more than `KEPT_BYTES`, these. Less than `LEAST_BYTES` changes nothing.
        environment: glibc's own settings there (`MALLOC_TRIM_THRESHOLD_` and the like, `GLIBC_TUNABLES`) win.

    Returns:
        Whether it does: not where the environment or another C library decides.
    """
    if num_bytes < LEAST_BYTES:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(_sets_malloc(name, value) for name, value in environment.items()):
        return False
    num_bytes = min(num_bytes, KEPT_BYTES)
    blocks = mallopt(_MMAP_THRESHOLD, num_bytes) or mallopt(_MMAP_THRESHOLD, LEAST_BYTES)
    return bool(blocks and mallopt(_TRIM_THRESHOLD, num_bytes))


def give_back_freed_memory() -> None:
    """Give to the system what is kept, such as the memory of an engine that is no longer used."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _sets_malloc(name: str, value: str) -> bool:
    return name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "glibc.malloc." in value)
