"""The errors of a build in place that cannot be made. Every test runs on such a build, so it needs no test here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_in_place", ROOT / "cmake" / "build_in_place.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_that_is_missing_is_told_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert script.problems() == []
    monkeypatch.setattr(script, "PACKAGES", {"numpy": "numpy", "no_such_module": "no-such", "nor_this": "nor-this"})
    monkeypatch.setattr(script, "tool", lambda name: None)
    monkeypatch.setattr(script, "OLDEST_PYTHON", (9, 1))
    monkeypatch.setattr(script, "LEAST_DISK_BYTES", 10**18)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path / name))
    for variable in ("CXX", "CUDACXX"):
        monkeypatch.delenv(variable, raising=False)
    python, packages, cmake, compiler, header, nvcc, disk = script.problems(["DPN_RT_CUDA=ON"], tmp_path / "build")
    assert python.endswith("expected 9.1 or newer")
    assert packages == f"this Python ({sys.executable}) lacks: no-such, nor-this"
    assert cmake.startswith("there is no cmake") and compiler.startswith("there is no C++ compiler")
    assert header.startswith(f"there is no {tmp_path / 'include' / 'Python.h'}")
    assert nvcc.startswith("there is no nvcc") and disk.startswith(f"{tmp_path} has ")
    assert len(script.problems([], tmp_path)) == 6, "without CUDA there is no need of nvcc"


def test_a_failing_command_ends_the_build_by_name(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "commands", lambda *_: [[sys.executable, "-c", "raise SystemExit(3)"]])
    monkeypatch.setattr(sys, "argv", ["build_in_place.py"])
    with pytest.raises(SystemExit, match="failed with exit status 3: .*SystemExit"):
        script.main()


def test_the_extension_is_built_for_this_python_and_put_into_the_package(script: ModuleType) -> None:
    configure, _, install = script.commands(Path("somewhere"), ["DPN_RT_CUDA=ON"])
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure
    assert "-DDPN_RT_CUDA=ON" in configure
    assert install[-2:] == ["--prefix", str(ROOT)]
