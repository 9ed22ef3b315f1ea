"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from dpn_rt.errors import EngineError


@contextlib.contextmanager
def replaced_directory(target: Path, num_bytes: int, replace: bool) -> Iterator[Path]:
    """A new directory beside `target` that takes its name when the block ends without an exception.

    On any exception, Ctrl-C included, the new directory is removed and `target` is as it was. With `replace`, the
    directory at `target` is moved aside, and removed once the new one has its name. Call `settle` first.

    Args:
        num_bytes: about to be written; a disk with less free space is an error before anything is written.

    Raises:
        EngineError: the disk is full or the directory cannot be written.
    """
    target = target.resolve()  # through a link: the directory it names is replaced, not the link
    mark = secrets.token_hex(4)  # named before it is made, so that no moment exists at which it would not be removed
    partial = target.parent / f".{target.name}.{mark}.partial"
    retired = target.parent / f".{target.name}.{mark}.retired"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, num_bytes)
        partial.mkdir()
        with _locked(partial):
            yield partial
            sync_directory(partial)
            if replace:
                target.rename(retired)
            partial.rename(target)
            if replace:
                retired.rename(partial)  # from here on what was replaced is no more than something to remove
        sync_directory(target.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise EngineError(f"{target}: cannot be written: {reason}; nothing was left behind") from error
    finally:
        if retired.exists() and not target.exists():
            retired.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def settle(target: Path) -> None:
    """Tidies up behind writers of `target` that were killed without a chance to do it themselves.

    What they had not finished is removed. What they had moved aside gets its name back, unless something has it.
    """
    target = target.resolve()
    for partial in _beside(target, "partial"):
        with contextlib.suppress(OSError), _locked(partial):
            shutil.rmtree(partial, ignore_errors=True)
    for retired in _beside(target, "retired"):
        if retired.with_suffix(".partial").exists():
            continue  # of a writer that is alive, between its two renames
        with contextlib.suppress(OSError):  # of a rename onto anything but nothing or an empty directory
            retired.rename(target)


def moved_aside(target: Path) -> Path | None:
    """What `settle` would put back at `target`."""
    return next(iter(_beside(target.resolve(), "retired")), None)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to a new file, through to the disk; directories are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory as lasting as the files' contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory; it ends with the process, however that ends. BlockingIOError: another holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _beside(target: Path, kind: str) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.*.{kind}"))


def _check_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes:
        raise EngineError(f"{target}: {num_bytes:,} bytes are needed, the disk has {free:,} free")
