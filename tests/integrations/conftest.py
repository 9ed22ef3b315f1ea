"""An engine of the small trained model, and stand-ins of the harnesses' packages."""

from __future__ import annotations

import abc
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrations")
    return build_engine(ROOT / "examples/tiny_dpn/checkpoint", folder / "engine", dtype="float32").path


@pytest.fixture(scope="package")
def llm(engine_dir: Path) -> LLM:
    return LLM(engine_dir)


class Lmms(abc.ABC):
    """What lmms-eval documents of its class of models."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[Any]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...


def simple_parse_args_string(text: str) -> dict[str, Any]:
    """lmms-eval's: values keep quotation marks, and numbers become numbers."""
    pairs = re.findall(r"""(\w+)=("[^"]*"|'[^']*'|[^,]*)""", text)
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


class BaseModel:
    """What VLMEvalKit documents of its class of models."""

    INTERLEAVE = False
    allowed_types: Any = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        raise NotImplementedError


def imported(monkeypatch: pytest.MonkeyPatch, name: str, stubs: dict[str, dict[str, Any]]) -> Iterator[ModuleType]:
    """A module of the product that sees stand-ins of a package's modules."""
    for stub, content in stubs.items():
        module = ModuleType(stub)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, stub, module)
        parent, _, child = stub.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`dpn_rt.integrations.lmms_eval` with a stand-in of lmms-eval."""
    stubs: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.utils": {"simple_parse_args_string": simple_parse_args_string},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
    }
    yield from imported(monkeypatch, "dpn_rt.integrations.lmms_eval", stubs)


@pytest.fixture
def vlmevalkit(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`dpn_rt.integrations.vlmevalkit` with a stand-in of VLMEvalKit."""
    stubs: dict[str, dict[str, Any]] = {"vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModel}}
    yield from imported(monkeypatch, "dpn_rt.integrations.vlmevalkit", stubs)
