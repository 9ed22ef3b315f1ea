"""The part of TensorRT-LLM's API that is used: an error names every missing call."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dpn_rt.backends.tensorrt_llm import contract
from dpn_rt.backends.tensorrt_llm.contract import CALLS, METHODS, check_version, find_calls, load_surface
from dpn_rt.errors import PlanError


def play_package(patch: pytest.MonkeyPatch, version: str = "1.2.0") -> types.ModuleType:
    """A fake package with every call that is used; each takes only the parameters that are passed to it."""
    package = types.ModuleType("tensorrt_llm")
    package.__version__ = version  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "tensorrt_llm", package)
    for call in CALLS:
        parts = call.module.split(".")
        for depth in range(2, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules or not hasattr(sys.modules[name], "played"):
                module = types.ModuleType(name)
                module.played = True  # type: ignore[attr-defined]
                patch.setitem(sys.modules, name, module)
        setattr(sys.modules[call.module], call.name, played_class(call.name, call.parameters))
    return package


def played_class(name: str, parameters: tuple[str, ...]) -> type:
    scope: dict[str, type] = {}
    exec(f"class {name}:\n    def __init__(self, {', '.join(parameters)}): ...", scope)
    for method in METHODS.get(name, ()):
        setattr(scope[name], method, None)
    return scope[name]


def test_a_whole_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    package = play_package(monkeypatch)
    found = find_calls(package, "1.2.0")
    assert set(found.calls) == {call.name for call in CALLS}
    assert found.Session is package.runtime.Session if hasattr(package, "runtime") else found.Session
    with pytest.raises(AttributeError):
        _ = found.nothing_of_that_name


def test_everything_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = play_package(monkeypatch)
    del sys.modules["tensorrt_llm.layers"].RmsNorm  # type: ignore[attr-defined]
    sys.modules["tensorrt_llm.layers"].ColumnLinear = played_class("ColumnLinear", ("in_features",))  # type: ignore[attr-defined]
    del sys.modules["tensorrt_llm.runtime"].Session.infer_shapes  # type: ignore[attr-defined]
    with pytest.raises(PlanError) as info:
        find_calls(package, "1.2.0")
    message = str(info.value)
    assert "tensorrt_llm.layers.RmsNorm is missing" in message
    assert "ColumnLinear(out_features=) is missing" in message
    assert "ColumnLinear(in_features=)" not in message
    assert "Session.infer_shapes is missing" in message


@pytest.mark.parametrize("version", ["0.21.0", "1.3.0rc20", "2.0", "unknown", "1"])
def test_versions_without_the_backend(version: str) -> None:
    with pytest.raises(PlanError, match=r"expected tensorrt_llm 1\.0 to 1\.2"):
        check_version(version)


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0rc3", "1.2.1"])
def test_versions_with_it(version: str) -> None:
    check_version(version)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(PlanError, match=r"tensorrt_llm cannot be imported: .*1\.0 to 1\.2"):
        load_surface()


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    play_package(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=r"tensorrt_llm 1\.2\.0 builds and runs engines on the GPU that is there"):
        load_surface()


def test_with_both_the_surface_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    play_package(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_surface().version == "1.2.0"
    assert contract.PACKAGE == "tensorrt_llm"
