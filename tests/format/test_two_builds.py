"""Builds that meet at one output, and disks without room: one whole engine or none, and no litter."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.errors import DpnError, EngineError
from dpn_rt.format.atomic_dir import replaced_directory, settle
from dpn_rt.format.engine_dir import MANIFEST, EngineDir, write_engine
from dpn_rt.format.swapped_files import own_files
from tests.format.engines import MODEL, SOURCE, names, random_weights


@pytest.mark.parametrize("state", ["absent", "empty", "engine"])
def test_two_builds_at_the_same_time(tmp_path: Path, state: str) -> None:
    """Both write their weights before one of them ends."""
    target = tmp_path / "engine"
    if state == "empty":
        target.mkdir()
    if state == "engine":
        write_engine(target, MODEL, SOURCE, random_weights().items(), {"old.json": b"{}"})
    barrier, ends = threading.Barrier(2), []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from random_weights().items()
        barrier.wait(30)

    def build(name: str) -> None:
        try:
            write_engine(target, MODEL, SOURCE, weights(), {name: b"{}"}, force=state == "engine")
            ends.append("")
        except DpnError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=build, args=(f"{name}.json",)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    lost = [end for end in ends if end]
    assert len(ends) == 2 and len(lost) < 2
    assert all(re.search("another build", message) for message in lost)
    EngineDir.open(target)
    assert names(target) == ["engine.json", "processor", "weights.safetensors"]
    assert names(target / "processor") in (["a.json"], ["b.json"])
    assert names(tmp_path) == ["engine"]


def test_new_files_of_another_build_may_vanish_while_files_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".01234567.partial" / "processor").mkdir(parents=True)
    (tmp_path / "processor").mkdir()
    for name in ("engine.json", "processor/a.json", ".01234567.partial/engine.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "processor")
    scandir = os.scandir

    def vanishing(path: Any = ".") -> Any:
        if ".partial" in os.fspath(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert sorted(own_files(tmp_path)) == ["engine.json", "link", "processor/a.json"]


@pytest.mark.parametrize("state", ["absent", "empty"])
@pytest.mark.parametrize("moment", ["before its lock", "with its lock"])
def test_a_build_that_begins_as_another_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, moment: str
) -> None:
    """A new directory that is not locked yet looks like one whose writer was killed."""
    target, mkdir, cleaned, held = tmp_path / "engine", Path.mkdir, [], []
    if state == "empty":
        target.mkdir()

    def mkdir_and_clean(self: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(self, *args, **kwargs)
        if self.name.endswith(".partial") and not cleaned:
            cleaned.append(self)
            if moment == "with its lock":
                held.append(os.open(self, os.O_RDONLY))
                fcntl.flock(held[0], fcntl.LOCK_EX)
            else:
                settle(target, MANIFEST)

    monkeypatch.setattr(Path, "mkdir", mkdir_and_clean)
    write_engine(target, MODEL, SOURCE, random_weights().items())
    monkeypatch.undo()
    for descriptor in held:
        os.close(descriptor)
    assert len(cleaned) == 1 and not cleaned[0].exists()
    EngineDir.open(target)
    assert names(tmp_path) == ["engine"] and names(target) == ["engine.json", "weights.safetensors"]


def test_a_swap_that_another_one_holds_up(tmp_path: Path) -> None:
    """The lock is on the directory that both would change."""
    write_engine(tmp_path, MODEL, SOURCE, random_weights().items())
    with replaced_directory(tmp_path, 0, True, "engine.json") as partial:
        (partial / "engine.json").write_bytes(b"{}")
        script = (
            "import fcntl, os, sys\n"
            "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print('held', flush=True); input()"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(EngineError, match="another build is putting its files there: build again"):
            write_engine(tmp_path, MODEL, SOURCE, random_weights().items(), force=True)
        other.communicate("\n")
    assert names(tmp_path) == ["engine.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_becomes_full(tmp_path: Path, code: int) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(random_weights().items()))
        raise OSError(code, "x")

    num_bytes = sum(tensor.nbytes for tensor in random_weights().values())
    with pytest.raises(EngineError) as info:
        write_engine(tmp_path / "engine", MODEL, SOURCE, failing())
    message = str(info.value)
    assert str(tmp_path / "engine") in message
    assert re.search(rf"the disk is full: about {num_bytes:,} bytes are needed, [\d,]+ were free", message)
    assert names(tmp_path) == []


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """A real failure of the system in the middle of a file."""
    weights, before = random_weights(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EngineError, match="File too large: about [0-9,]+ bytes are needed"):
            write_engine(tmp_path / "engine", MODEL, SOURCE, weights.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
