"""An engine directory is complete or absent, whatever was there, fails or is killed."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.errors import EngineError
from dpn_rt.format import weight_file
from dpn_rt.format.atomic_dir import replaced_directory, settle
from dpn_rt.format.engine_dir import EngineDir, is_engine, write_engine
from tests.format.engines import MODEL, SOURCE, names, random_weights


def test_existing_engine_needs_force(engine: EngineDir) -> None:
    before = (engine.path / "engine.json").read_bytes()
    with pytest.raises(EngineError, match="--force"):
        write_engine(engine.path, MODEL, SOURCE, random_weights().items())
    assert (engine.path / "engine.json").read_bytes() == before
    write_engine(engine.path, MODEL, SOURCE, random_weights().items(), force=True)
    assert names(engine.path) == ["engine.json", "weights.safetensors"]
    assert names(engine.path.parent) == ["engine"]


@pytest.mark.parametrize("force", [False, True])
def test_other_peoples_files_are_never_replaced(engine: EngineDir, force: bool) -> None:
    (engine.path / "notes.txt").write_text("mine")
    (engine.path.parent / "file").write_text("mine")
    (engine.path.parent / "directory" / "photos").mkdir(parents=True)
    (engine.path.parent / "directory" / "photos" / "cat.png").write_text("mine")
    assert not is_engine(engine.path)
    for name in ("engine", "directory"):
        with pytest.raises(EngineError, match="they are not replaced"):
            write_engine(engine.path.parent / name, MODEL, SOURCE, random_weights().items(), force=force)
    with pytest.raises(EngineError, match="is not a directory"):
        write_engine(engine.path.parent / "file", MODEL, SOURCE, random_weights().items(), force=force)
    assert (engine.path / "notes.txt").read_text() == "mine"
    assert names(engine.path.parent) == ["directory", "engine", "file"]


def test_empty_directory_and_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write_engine(tmp_path / "link", MODEL, SOURCE, random_weights().items())
    write_engine(tmp_path / "link", MODEL, SOURCE, random_weights().items(), force=True)
    assert (tmp_path / "link").is_symlink()
    EngineDir.open(tmp_path / "empty")
    assert names(tmp_path) == ["empty", "link"]


def write_into(path: Path, force: bool = True) -> None:
    write_engine(path, MODEL, SOURCE, random_weights().items(), {"a.json": b"{}"}, force=force)


@pytest.mark.parametrize("place", [".", "../here", "link", "absolute"])
def test_the_working_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    here = tmp_path / "here"
    here.mkdir(mode=0o750)
    (here.parent / "link").symlink_to(here)
    monkeypatch.chdir(here)
    output = {"link": here.parent / "link", "absolute": here}.get(place, Path(place))
    inode = here.stat().st_ino
    for force in (False, True, True):
        write_into(output, force)
        assert names(Path()) == ["engine.json", "processor", "weights.safetensors"]
        assert (here.stat().st_ino, Path.cwd().stat().st_ino, here.stat().st_mode & 0o777) == (inode, inode, 0o750)
        EngineDir.open(Path())
    assert names(tmp_path) == ["here", "link"]


def test_a_working_directory_inside_the_engine_stays(engine: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine.path / "processor")
    write_into(Path(".."))
    assert names(Path()) == ["a.json"]
    write_engine(Path(".."), MODEL, SOURCE, random_weights().items(), force=True)
    assert names(Path()) == []
    EngineDir.open(engine.path)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES], ids=["mount point", "other disk", "parent"])
def test_a_directory_that_cannot_be_renamed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A mount point, an overlay's layer, a directory whose parents belong to root: only what is below it may change."""
    target = tmp_path / "engine"
    (target / "lost+found").mkdir(parents=True)

    def checked(do: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Path, *arguments: Any, **options: Any) -> Any:
            places = [self, *(a for a in arguments if isinstance(a, Path))]
            if any(not place.is_relative_to(target) or place == target for place in places) and not (
                do is mkdir and self.is_dir()
            ):
                raise OSError(code, os.strerror(code))
            return do(self, *arguments, **options)

        return run

    rename, mkdir, rmdir = Path.rename, Path.mkdir, Path.rmdir
    for name, do in (("rename", rename), ("mkdir", mkdir), ("rmdir", rmdir)):
        monkeypatch.setattr(Path, name, checked(do))
    for force in (False, True):
        write_into(target, force)
        EngineDir.open(target)
        assert names(target) == ["engine.json", "lost+found", "processor", "weights.safetensors"]


def test_files_that_appear_during_a_build_are_kept(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        yield from random_weights().items()
        (tmp_path / "engine" / "notes.txt").write_text("mine")

    with pytest.raises(EngineError, match="files have appeared there meanwhile"):
        write_engine(tmp_path / "engine", MODEL, SOURCE, slowly())
    assert names(tmp_path / "engine") == ["notes.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "No space")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, failure: BaseException, exists: bool) -> None:
    if exists:
        write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        for position, item in enumerate(random_weights().items()):
            if position == 5:
                raise failure
            yield item

    wanted, message = (EngineError, "disk is full") if isinstance(failure, OSError) else (type(failure), None)
    with pytest.raises(wanted, match=message):
        write_engine(tmp_path / "engine", MODEL, SOURCE, failing(), force=True)
    assert names(tmp_path) == (["engine"] if exists else [])
    if exists:
        EngineDir.open(tmp_path / "engine")


def moves_of_a_swap() -> range:
    """Renames of a build that replaces an engine of three files by one of two: out, the name, in."""
    return range(3 + 1 + 2)


@pytest.mark.parametrize("number", moves_of_a_swap())
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EACCES, "no")])
def test_failure_while_swapping_keeps_the_old_engine(
    engine: EngineDir, monkeypatch: pytest.MonkeyPatch, number: int, failure: BaseException
) -> None:
    before = contents(engine.path)
    rename, count = Path.rename, iter(range(100))

    def failing(self: Path, target: Path) -> Path:
        if next(count) == number:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EngineError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_engine(engine.path, MODEL, SOURCE, random_weights().items(), force=True)
    EngineDir.open(engine.path)
    assert contents(engine.path) == before
    assert names(engine.path.parent) == ["engine"]


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from dpn_rt.format.atomic_dir import replaced_directory\n"
        "with replaced_directory(Path(sys.argv[1]), 0, False, 'seal') as partial:\n"
        "    (partial / 'weights').write_bytes(b'1'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "engine")], check=False)
    left = names(tmp_path)
    assert len(left) == 1 and left[0].endswith(".partial")
    write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())
    assert names(tmp_path) == ["engine"]
    (tmp_path / "empty").mkdir()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "empty")], check=False)
    assert len(names(tmp_path / "empty")) == 1
    write_engine(tmp_path / "empty", MODEL, SOURCE, random_weights().items())
    assert names(tmp_path / "empty") == ["engine.json", "weights.safetensors"]


KILLED_WHILE_SWAPPING = """
import os, signal, sys
from pathlib import Path
from dpn_rt.format import swapped_files
from dpn_rt.format.atomic_dir import replaced_directory
rename, rmtree, number = Path.rename, swapped_files.shutil.rmtree, int(sys.argv[2])
count = iter(range(100))
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def killed(self, target):
    if next(count) == number:
        kill()
    return rename(self, target)
Path.rename = killed
swapped_files.shutil.rmtree = lambda path, **options: kill()
with replaced_directory(Path(sys.argv[1]), 0, True, "engine.json") as partial:
    (partial / "engine.json").write_bytes(b"new")
    (partial / "weights").write_bytes(b"1")
"""


@pytest.mark.parametrize("number", moves_of_a_swap())
def test_what_a_build_killed_while_swapping_left_is_one_whole_engine(engine: EngineDir, number: int) -> None:
    """The old one while its files move out; the new one, which is complete, from then on."""
    before = contents(engine.path)
    subprocess.run([sys.executable, "-c", KILLED_WHILE_SWAPPING, str(engine.path), str(number)], check=False)
    assert any(name.startswith(".") for name in names(engine.path))
    if not (engine.path / "engine.json").exists():
        with pytest.raises(EngineError, match=r"a build was killed there: build again, or move the files of .*\.reti"):
            EngineDir.open(engine.path)
    settle(engine.path, "engine.json")
    assert contents(engine.path) == (before if number < 4 else {"engine.json": b"new", "weights": b"1"})
    assert names(engine.path.parent) == ["engine"]
    settle(engine.path, "engine.json")
    if number < 4:
        EngineDir.open(engine.path)
        with pytest.raises(EngineError, match="an engine exists there"):
            write_engine(engine.path, MODEL, SOURCE, random_weights().items())


def test_an_engine_that_a_killed_build_had_replaced_is_removed(engine: EngineDir) -> None:
    subprocess.run([sys.executable, "-c", KILLED_WHILE_SWAPPING, str(engine.path), "99"], check=False)
    assert len(names(engine.path)) == 4  # the new files, and the old ones
    settle(engine.path, "engine.json")
    assert names(engine.path) == ["engine.json", "weights"]


def test_what_a_build_that_still_runs_has_moved_aside_is_left_alone(engine: EngineDir) -> None:
    with replaced_directory(engine.path, 0, True, "engine.json") as running:
        (running.with_suffix(".retired")).mkdir()
        (running / "engine.json").write_text("new")
        before = names(engine.path)
        settle(engine.path, "engine.json")
        assert names(engine.path) == before
        running.with_suffix(".retired").rmdir()


def test_users_files_with_similar_names_are_left_alone(tmp_path: Path) -> None:
    for name in (".mine.partial", ".12345678.partials", "a.partial"):
        (tmp_path / "engine" / name).mkdir(parents=True)
    (tmp_path / "engine" / ".87654321.partial").write_text("a file")
    settle(tmp_path / "engine", "engine.json")
    assert len(names(tmp_path / "engine")) == 4


def test_a_build_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "engine", 0, False, "engine.json") as other:
        write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())
        assert other.is_dir() and names(tmp_path) == sorted([other.name, "engine"])
        shutil.rmtree(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]


def test_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = dataclasses.make_dataclass("Usage", ["free"])(free=10)
    monkeypatch.setattr("dpn_rt.format.atomic_dir.shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(weight_file, "write_weights", None)
    with pytest.raises(EngineError, match="bytes are needed, the disk has 10 free"):
        write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())
    assert names(tmp_path) == []
