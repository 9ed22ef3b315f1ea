"""What is said where the host's memory ends, which libraries report in many forms."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpn_rt.errors import CapacityError

_TEXTS = ("can't allocate memory", "not enough memory", "failed to map segment", "std::bad_alloc")
"""Of torch's allocator, oneDNN, the loader of libraries, and C++."""
_MOST_CAUSES = 20


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, comes of too little memory, which it does not say in our words yet."""
    if isinstance(error, CapacityError):
        return False
    for _ in range(_MOST_CAUSES):
        if error is None:
            return False
        is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if isinstance(error, MemoryError) or is_refused or any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def not_enough_memory(engine: Path) -> str:
    """The message for an engine that cannot be loaded for lack of memory."""
    size = 0
    with suppress(OSError):
        size = sum(file.stat().st_size for file in engine.rglob("*") if file.is_file())
    return (
        f"{engine}: not enough memory to load the engine: expected room for its files ({size:,} bytes), its KV cache "
        "(kv_cache_bytes), and about 1 GB for each process (is there a limit, such as that of ulimit -v?)"
    )


@contextmanager
def telling_memory(engine: Path) -> Iterator[None]:
    """Makes errors that come of too little memory, in whatever form, one of ours.

    Raises:
        CapacityError: memory is lacking.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if lacks_memory(error):
            raise CapacityError(not_enough_memory(engine)) from error
        raise
