"""Host memory in huge pages.

Small pages make a processor that streams weights or scattered KV blocks wait for address translation, above all in a
virtual machine. Files are mapped in small pages, so weights that are to be read fast are copied.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""What Linux gives, the choice in brackets: `always [madvise] never`."""
_ALIGNMENT = 64
"""Of a tensor, in bytes: a cache line."""


def has_huge_pages() -> bool:
    """Whether this system gives huge pages to memory that asks for them."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def huge_memory(num_bytes: int) -> Tensor:
    """`[num_bytes]` uint8, in huge pages where the system has them; not initialised.

    The system provides a page when it is first written.

    Args:
        num_bytes: at least 1.

    Raises:
        MemoryError: there is too little memory.
    """
    try:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, RuntimeError) as error:
        raise MemoryError(f"{num_bytes:,} bytes: {error}") from error
    with suppress(OSError):  # a system built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def gather(tensors: dict[str, Tensor], *, required: bool) -> dict[str, Tensor]:
    """Copies of tensors, one behind the other in huge pages, contiguous.

    Args:
        tensors: on the CPU. Empty afterwards: each is given up when it has been copied.
        required: raise where there is no room; else `tensors` come back as they were.

    Raises:
        MemoryError: there is too little memory for copies that are required.
    """
    try:
        memory = huge_memory(max(1, sum(map(_padded_bytes, tensors.values()))))
    except MemoryError:
        if required:
            raise
        return tensors
    copies, start = {}, 0
    for name in list(tensors):
        tensor = tensors.pop(name)
        copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name] = copy.copy_(tensor)
        start += _padded_bytes(tensor)
    return copies


def _padded_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
