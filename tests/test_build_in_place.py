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


def test_all_that_is_missing_is_told_at_once(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.problems() == []
    monkeypatch.setattr(script, "PACKAGES", {"numpy": "numpy", "no_such_module": "no-such", "nor_this": "nor-this"})
    monkeypatch.setattr(script, "tool", lambda name: None)
    monkeypatch.setattr(script, "OLDEST_PYTHON", (9, 1))
    python, packages, cmake = script.problems()
    assert python.endswith("expected 9.1 or newer")
    assert packages == f"this Python ({sys.executable}) lacks: no-such, nor-this"
    assert cmake.startswith("there is no cmake")


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
