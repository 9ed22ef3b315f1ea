"""Writes directories so that they are either complete or absent.

A directory that does not exist is written next to its place and renamed. One that exists stays the same directory,
which may be a mount point, a shell's working directory, or all that the user may write to: its files are replaced
(`swapped_files.py`).
"""

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
from dpn_rt.format.swapped_files import Swap, own_files, partial_directories
from dpn_rt.schema.files import real_path

_APPEARED = "files have appeared there meanwhile, as of another build"


@contextlib.contextmanager
def replaced_directory(target: Path, num_bytes: int, replace: bool, seal: str) -> Iterator[Path]:
    """A new directory whose files are those of `target` when the block ends without an exception.

    After any exception, Ctrl-C included, the new directory is removed and `target` is as before. Call `settle` first.

    Args:
        target: need not exist; its parents are made. A link to a directory stays, and the directory that it names too.
        num_bytes: that will be written.
        replace: files that `target` holds are removed; otherwise they are an error.
        seal: the file whose presence says that the directory is complete: the first to go and the last to come.

    Raises:
        EngineError: the directory cannot be written, or the disk becomes full or has less than `num_bytes` free at the
            start.
    """
    target = real_path(target)
    exists = target.is_dir()
    parent, prefix = (target, ".") if exists else (target.parent, f".{target.name}.")
    try:
        _make(parent)
        _check_space(target, parent, num_bytes)
        with _own_directory(parent, prefix) as partial:
            yield partial
            sync_directory(partial)
            if exists:
                with _locked(target):  # two builds that swap at the same time would mix their files
                    if not replace and any(own_files(target)):
                        raise FileExistsError(errno.ENOTEMPTY, _APPEARED)
                    Swap(target, _mark(partial), seal).run()
            else:
                partial.rename(target)
        sync_directory(parent)
    except OSError as error:
        raise EngineError(
            f"{target}: cannot be written: {_reason(error, parent, num_bytes)}; nothing was left behind"
        ) from error


def _make(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # which says of a target that its files have appeared
        raise NotADirectoryError(errno.ENOTDIR, f"{parent} is not a directory") from error


@contextlib.contextmanager
def _own_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new, locked directory, removed at the end of the block unless it was renamed.

    Until it is locked, the `settle` of another build takes it for one whose writer was killed; then there is a next.
    """
    while True:
        # The name exists before the directory does, so an interrupt always removes it.
        path = parent / f"{prefix}{secrets.token_hex(4)}.partial"
        try:
            path.mkdir()
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(_locked(path))
                except (BlockingIOError, FileNotFoundError):
                    continue
                if path.is_dir():
                    yield path
                    return
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _mark(partial: Path) -> str:
    return partial.name.split(".")[-2]


def _reason(error: OSError, parent: Path, num_bytes: int) -> str:
    """Why a directory cannot be written. What was written of it is gone by now."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(parent).free
        return f"the disk is full: about {num_bytes:,} bytes are needed, {free:,} were free"
    if error.errno == errno.EFBIG:
        return (
            f"File too large: about {num_bytes:,} bytes are needed, more than the disk or this process may hold in one"
        )
    if isinstance(error, BlockingIOError):
        return "another build is putting its files there: build again"
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return _APPEARED
    return error.strerror or type(error).__name__


def settle(target: Path, seal: str) -> None:
    """Clean up after writers of `target` that were killed.

    An unfinished directory is removed. A complete one that was about to take the place of others does so now.
    """
    target = real_path(target)
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError), _locked(partial):
            shutil.rmtree(partial, ignore_errors=True)
    for partial in partial_directories(target):
        with contextlib.suppress(OSError), _locked(partial):
            Swap(target, _mark(partial), seal).settle()
            shutil.rmtree(partial, ignore_errors=True)


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


def _check_space(target: Path, existing: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise EngineError(f"{target}: {num_bytes:,} bytes are needed, the disk has {free:,} free: make room there")
