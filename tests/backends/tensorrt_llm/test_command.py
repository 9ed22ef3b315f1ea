"""`python -m dpn_rt.builders.tensorrt_llm`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dpn_rt.builders.tensorrt_llm.__main__ import main
from tests.engine.models import write_random_engine


def test_checkpoints_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = write_random_engine(tmp_path / "engine")
    assert main(["--engine", str(engine), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / f"out/checkpoints/stage{stage}") for stage in range(4)]
    assert all((Path(line) / "rank0.safetensors").is_file() for line in printed)


def test_engines_without_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    engine = write_random_engine(tmp_path / "engine")
    assert main(["--engine", str(engine), "--output", str(tmp_path / "out"), "--build"]) == 1
    assert capsys.readouterr().err.startswith("error: tensorrt_llm cannot be imported")


def test_limits_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = write_random_engine(tmp_path / "engine")
    assert main(["--engine", str(engine), "--output", str(tmp_path / "out"), "--max-batch", "0"]) == 1
    assert "max batch 0: expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
