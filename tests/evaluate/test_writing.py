"""Files that are made as a whole never take the place of what is no file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.writing import check_target, write_whole


@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_stays_one(tmp_path: Path, is_link: bool) -> None:
    """So does a device, such as /dev/null: who may write to its directory would have a file there."""
    pipe, path = tmp_path / "pipe", tmp_path / ("link" if is_link else "pipe")
    os.mkfifo(pipe)
    if is_link:
        path.symlink_to(pipe)
    with pytest.raises(EvaluationError, match=f"{path.name}: cannot be written there: expected a regular file"):
        check_target(path)
    with pytest.raises(EvaluationError, match=f"{path.name}: cannot be written: not a regular file"):
        write_whole(path, b"text")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and {each.name for each in tmp_path.iterdir()} == {"pipe", path.name}


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in (b"new", b"again"):
        check_target(tmp_path / "link")
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == text
