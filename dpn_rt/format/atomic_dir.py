"""Writes directories so that they are either complete or absent."""

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
    """A new directory next to `target`, renamed to `target` when the block ends without an exception.

    After any exception, Ctrl-C included, the new directory is removed and `target` is as before. Call `settle` first.

    Args:
        target: need not exist; its parents are made.
        num_bytes: that will be written.
        replace: whether there is a directory at `target`; it is moved aside, and removed after the rename.

    Raises:
        EngineError: the directory cannot be written, or the disk becomes full or has less than `num_bytes` free at the
            start.
    """
    target = target.resolve()  # a link stays; the directory that it points to is replaced
    mark = secrets.token_hex(4)  # the names exist before the directories do, so an interrupt always removes them
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
                retired.rename(partial)  # `settle` removes it if this process is killed now, and never restores it
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
    """Clean up after writers of `target` that were killed.

    An unfinished directory is removed. A directory that was moved aside gets its name back, unless the name is taken.
    """
    target = target.resolve()
    for partial in _beside(target, "partial"):
        with contextlib.suppress(OSError), _locked(partial):
            shutil.rmtree(partial, ignore_errors=True)
    for retired in _beside(target, "retired"):
        if retired.with_suffix(".partial").exists():
            continue  # its writer is alive, between the two renames
        with contextlib.suppress(OSError):  # the name is taken, by more than an empty directory
            retired.rename(target)


def moved_aside(target: Path) -> Path | None:
    """The directory that `settle` would rename to `target`; None where there is none."""
    return next(iter(_beside(target.resolve(), "retired")), None)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk; its parent directories are made.

    Raises:
        FileExistsError: the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory within the block. The system frees it if the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
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
