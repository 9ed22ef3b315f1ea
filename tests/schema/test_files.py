"""Only regular files are opened, and none is read further than its kind can go. Nothing here may wait."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_rt.errors import CheckpointError
from dpn_rt.schema.files import is_there, open_file, read_file, read_text


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


NO_FILES: list[tuple[Callable[[Path], object], str]] = [
    (os.mkfifo, "a pipe, expected a regular file"),
    (Path.mkdir, "a directory, expected a regular file"),
    (make_socket, "a socket, expected a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "a device, expected a regular file"),
    (lambda path: path.symlink_to(path.parent), "a directory, expected a regular file"),
    (lambda path: path.symlink_to("nowhere"), "a link to nowhere, which does not exist"),
    (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
]


@pytest.mark.parametrize(("make", "message"), NO_FILES)
def test_what_is_no_regular_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make(tmp_path / "x")
    assert is_there(tmp_path / "x")
    with pytest.raises(CheckpointError) as info:
        read_file(tmp_path / "x", CheckpointError, 10)
    assert str(info.value) == f"{tmp_path / 'x'}: {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", "cannot be read: No such file"),
        ("x\0y", "its name has a NUL character"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_names_of_nothing(tmp_path: Path, name: str, message: str) -> None:
    assert not is_there(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        open_file(tmp_path / name, CheckpointError)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"1234")
    (tmp_path / "x").symlink_to("blob")
    assert read_file(tmp_path / "x", CheckpointError, 4) == b"1234"


def test_sizes(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes, expected at most 3"):
        read_file(tmp_path / "x", CheckpointError, 3)
    with pytest.raises(CheckpointError, match="expected at most 3"):  # its size is 0 until it is read
        read_file(Path("/proc/self/status"), CheckpointError, 3)


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("\ufeffä".encode())
    assert read_text(tmp_path / "x", CheckpointError, 10) == "ä"
    (tmp_path / "x").write_bytes("ä".encode("utf-16"))
    with pytest.raises(CheckpointError, match="byte 0 is 0xff, expected text in UTF-8"):
        read_text(tmp_path / "x", CheckpointError, 10)
