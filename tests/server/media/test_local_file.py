"""`file:` URLs read regular files below one folder and nothing else."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from dpn_rt.server.media.policy import MediaTooLargeError
from tests.server.media.image_site import IMAGE, load, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "cat.png").write_bytes(IMAGE)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "images-of-others").mkdir()
    (tmp_path / "images-of-others" / "cat.png").write_bytes(b"secret")
    return folder


@pytest.mark.parametrize("start", ["file://", "file:", "FILE://", "file://localhost", "file://LOCALHOST"])
def test_a_file(folder: Path, start: str) -> None:
    assert load(f"{start}{folder}/cat.png", allowed_local_path=folder) == IMAGE


@pytest.mark.parametrize(
    "name", ["ein bild.png", "100%25.png", "?#.png", "日本.png", "a\nb.png", "..png", "deep/er/cat.png"]
)
def test_names_are_percent_decoded(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(IMAGE)
    assert load(f"file://{quote(str(folder / name))}", allowed_local_path=folder) == IMAGE


def test_names_that_are_not_utf8(folder: Path) -> None:
    (folder / "\ufffd.png").write_bytes(IMAGE)  # the name that lenient decoding would give
    refused(f"file://{folder}/%ff.png", allowed_local_path=folder)


def test_a_link_put_there_after_the_check(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_late(path: Path, flags: int) -> int:
        path.unlink()
        path.symlink_to(tmp_path / "secret")
        return original(path, flags)

    original = os.open
    monkeypatch.setattr("dpn_rt.server.media.local_file.os.open", open_late)
    refused(f"file://{folder}/cat.png", allowed_local_path=folder)


def test_a_folder_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert load(f"file://{tmp_path}/link/cat.png", allowed_local_path=tmp_path / "link") == IMAGE


def test_a_link_that_stays_inside(folder: Path) -> None:
    (folder / "link.png").symlink_to("cat.png")
    assert load(f"file://{folder}/link.png", allowed_local_path=folder) == IMAGE


def test_no_files_unless_a_folder_is_given(folder: Path) -> None:
    assert "reads no local files" in refused(f"file://{folder}/cat.png")


def test_what_is_not_a_file_below_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(folder)  # the name of a socket has at most 107 bytes
        unix.bind("socket")
    inside = ["", "/", "/.", "/missing", "/cat.png/x", "/loop", "/dangling", "/pipe", "/socket", "/" + "a" * 300]
    undecodable = ["/cat.png%00", "/%00", "/%ff"]
    outside = ["/..", "/../secret", "/%2e%2e/secret", "/%2E%2E%2Fsecret", "/x/../../secret", "/../missing"]
    outside += ["-of-others/cat.png", "/../images-of-others/cat.png", "/out", "/up/secret", "/zero"]
    elsewhere = ["/etc/passwd", "/", "/dev/zero", "/proc/self/environ"]
    for path in [f"{folder}{end}" for end in inside + undecodable + outside] + elsewhere:
        message = refused(f"file://{path}", allowed_local_path=folder)
        assert message.endswith("no readable regular file below the folder that this server allows"), path


def test_messages_do_not_tell_what_exists_elsewhere(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"  # messages cut long names, so both are of the same one
    missing = refused(f"file://{outside}", allowed_local_path=folder)
    outside.write_bytes(b"secret")
    assert refused(f"file://{outside}", allowed_local_path=folder) == missing


@pytest.mark.parametrize(
    "url",
    [
        "file://host{}",
        "file://127.0.0.1{}",
        "file://user@localhost{}",
        "file:cat.png",
        "file://",
        "file:",
        "file://localhost",
        "file://cat.png",
    ],
)
def test_hosts_and_relative_paths(folder: Path, url: str) -> None:
    assert "expected file:///absolute/path" in refused(url.format(folder / "cat.png"), allowed_local_path=folder)


@pytest.mark.parametrize("end", ["?size=1", "#top"])
def test_queries_and_fragments(folder: Path, end: str) -> None:
    assert "query or fragment" in refused(f"file://{folder}/cat.png{end}", allowed_local_path=folder)


def test_brackets(folder: Path) -> None:
    refused("file://[/cat.png", allowed_local_path=folder)


def test_the_limit_is_exact(folder: Path) -> None:
    url = f"file://{folder}/cat.png"
    assert load(url, allowed_local_path=folder, max_image_bytes=len(IMAGE)) == IMAGE
    with pytest.raises(MediaTooLargeError, match=f"more than {len(IMAGE) - 1} bytes"):
        load(url, allowed_local_path=folder, max_image_bytes=len(IMAGE) - 1)
