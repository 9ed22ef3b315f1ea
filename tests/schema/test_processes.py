"""A module of the package in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpn_rt.schema.processes import start_module


def test_the_working_directory_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dpn_rt", "enum"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with Path(os.devnull).open() as file:
        assert start_module("dpn_rt.errors", file.fileno()).wait(timeout=60) == 0
