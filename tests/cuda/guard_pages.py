"""Memory between pages that the system lets nobody access."""

from __future__ import annotations

import ctypes
import mmap

import torch

_NO_ACCESS = 0  # PROT_NONE


class GuardedBytes:
    """Some bytes against the page before or the page after them; neither page can be accessed."""

    def __init__(self, num_bytes: int, at_end: bool, alignment: int) -> None:
        """
        Args:
            num_bytes: that are asked for.
            at_end: whether they are against the page after them.
            alignment: of their address, in bytes. So up to `alignment` - 1 bytes stay unused between them and the page
                after them.
        """
        page = mmap.PAGESIZE
        size = max(-(-num_bytes // page), 1) * page
        memory = mmap.mmap(-1, size + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (whole.data_ptr(), whole.data_ptr() + page + size):
            if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _NO_ACCESS) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.all = whole[page : page + size]
        """`[size]` uint8, all that can be accessed."""
        begin = size - -(-num_bytes // alignment) * alignment if at_end else 0
        self.own = self.all[begin : begin + num_bytes]
        """`[num_bytes]` uint8."""
        self._begin, self._end = begin, begin + num_bytes

    @property
    def unused(self) -> torch.Tensor:
        """A copy of the other bytes that can be accessed."""
        return torch.cat((self.all[: self._begin], self.all[self._end :]))
