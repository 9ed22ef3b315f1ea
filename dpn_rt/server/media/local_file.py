"""`file:` URLs -> bytes of regular files below one folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dpn_rt.prompts.data_url import shorten
from dpn_rt.schema.files import real_path
from dpn_rt.server.media.policy import MediaError, MediaTooLargeError


def read_local_file(url: str, folder: Path | None, max_bytes: int) -> bytes:
    """The bytes of the file that `url` names. Blocks while reading.

    Args:
        folder: the file must be below it once all symbolic links are followed; None: every file is refused.

    Raises:
        MediaError: not a `file:` URL of this machine, or no readable regular file below `folder`. All cases of the
            latter have one message, so that it does not tell which files exist elsewhere.
        MediaTooLargeError: more than `max_bytes`.
    """
    name = f"image {shorten(url)}"
    if folder is None:
        raise MediaError(f"{name}: this server reads no local files, expected a data: URL")
    try:
        path = real_path(_path(url, name))
        if not path.is_relative_to(real_path(folder)):
            raise MediaError(_not_found(name))
        data = _read(path, name, max_bytes + 1)
    except MediaError:
        raise
    # NUL characters and invalid UTF-8 raise ValueError, loops of symbolic links RuntimeError.
    except (OSError, ValueError, RuntimeError) as error:
        raise MediaError(_not_found(name)) from error
    if len(data) > max_bytes:
        raise MediaTooLargeError(f"{name}: more than {max_bytes} bytes")
    return data


def _path(url: str, name: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost") or not parts.path.startswith("/"):
        raise MediaError(f"{name}: expected file:///absolute/path without a host")
    if parts.query or parts.fragment:
        raise MediaError(f"{name}: has a query or fragment, expected ? and # of a file's name as %3F and %23")
    return Path(unquote(parts.path, errors="strict"))


def _read(path: Path, name: str, num_bytes: int) -> bytes:
    # NOFOLLOW: the path may have become a link since it was resolved. NONBLOCK: opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise MediaError(_not_found(name))
        return file.read(num_bytes)


def _not_found(name: str) -> str:
    return f"{name}: no readable regular file below the folder that this server allows"
