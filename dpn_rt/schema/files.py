"""Opens files that users name: regular files alone, none larger than its kind can be. No other module opens them.

A pipe would wait for a writer, a device has no end, and a file in `/proc` has no size.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from dpn_rt.errors import DpnError

SETTINGS_BYTES = 16 << 20
"""Largest JSON file, such as config.json; published lists of 90,000 weights have 9 MiB, others about 1 MiB."""
VOCABULARY_BYTES = 256 << 20
"""Largest file of a tokenizer; published ones have up to about 35 MiB."""
TEXT_BYTES = 1 << 20
"""Largest chat template, certificate or key."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_there(path: Path) -> bool:
    """Whether a name is taken, by a file or by anything else: `open_file` says what is wrong with that.

    A file that may be absent is looked for with this. `Path.is_file` would ignore a pipe, a link to nothing, or what
    stands in a directory that may not be searched.
    """
    try:
        path.lstat()
    except PermissionError:
        return True
    except (OSError, ValueError):  # or no name that a file can have
        return False
    return True


def real_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path without links. `Path.resolve` ends with a RuntimeError where links lead in a circle."""
    return Path(os.path.realpath(path))


def is_directory(path: Path) -> bool:
    """Whether it is one; False for names that no file can have."""
    try:
        return path.is_dir()
    except OSError:  # longer than a name may be
        return False


def open_file(path: Path, error: type[DpnError]) -> io.BufferedReader:
    """A regular file, or one that a link leads to, opened to be read.

    Args:
        error: is raised, with the path.

    Raises:
        DpnError: it is missing, cannot be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe waits otherwise
    except (OSError, ValueError) as failure:
        raise error(f"{path}: {_reason(path, failure)}") from failure
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise error(f"{path}: {_KINDS.get(kind, 'no file')}, expected a regular file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, error: type[DpnError], most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        DpnError: as `open_file`, or the file is larger.
    """
    try:
        with open_file(path, error) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from failure
    if max(size, len(data)) > most:
        raise error(f"{path}: {max(size, len(data)):,} bytes, expected at most {most:,}")
    return data


def read_text(path: Path, error: type[DpnError], most: int) -> str:
    """As `read_file`, the text in UTF-8; a byte order mark is left out.

    Raises:
        DpnError: as `read_file`, or it is not UTF-8.
    """
    return decoded(read_file(path, error, most), str(path), error)


def decoded(data: bytes, name: str, error: type[DpnError]) -> str:
    """A text in UTF-8, without its byte order mark.

    Raises:
        DpnError: with the first byte that is none of UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{name}: byte {failure.start} is 0x{data[failure.start]:02x}, expected text in UTF-8") from failure


def _reason(path: Path, failure: OSError | ValueError) -> str:
    if not isinstance(failure, OSError):
        return "its name has a NUL character"
    if isinstance(failure, FileNotFoundError) and path.is_symlink():
        return f"a link to {path.readlink()}, which does not exist"
    if failure.errno == errno.ENXIO:  # how the system says that a socket cannot be opened
        return "a socket, expected a regular file"
    return f"cannot be read: {failure.strerror}"
