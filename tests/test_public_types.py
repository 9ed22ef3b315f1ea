"""What users hold can be copied, pickled and replaced, and says in plain words what it does not know."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.models.shapes import SHAPES
from dpn_rt import LLM, SamplingParams, errors
from dpn_rt.errors import BatchError, ConfigError, DpnError, RequestError
from dpn_rt.outputs import StreamDelta
from dpn_rt.reference import EagerDpn, EagerOutput
from dpn_rt.reference.open_config import OpenConfig
from dpn_rt.settings import EngineOptions, resolve
from tests.engine.models import MODEL, write_random_engine

FOREIGN = ("dpn_rt.integrations.",)
"""Modules that import the packages they are written for."""


def modules() -> Iterator[ModuleType]:
    """Every module of the package but those of other packages; its builders lie beside it."""
    root = Path(__file__).resolve().parent.parent
    for folder, prefix in (("dpn_rt", ""), ("builders", "dpn_rt.")):
        for file in sorted((root / folder).rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith(FOREIGN):
                yield importlib.import_module(prefix + name)


def frozen_dataclasses() -> list[type]:
    members = [value for module in modules() for _, value in inspect.getmembers(module, inspect.isclass)]
    chosen = {
        cls
        for cls in members
        if dataclasses.is_dataclass(cls) and cls.__module__.startswith("dpn_rt.") and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    }
    return sorted(chosen, key=lambda cls: (cls.__module__, cls.__qualname__))


def test_an_unknown_attribute_is_refused_by_its_name() -> None:
    """Frozen dataclasses with slots fail with "super(type, obj): obj must be an instance or subtype of type"."""
    classes = [cls for cls in frozen_dataclasses() if cls is not OpenConfig]
    assert SamplingParams in classes and len(classes) > 100
    for cls in classes:
        empty = object.__new__(cls)
        for change in (lambda value: setattr(value, "no_such_field", 1), lambda value: delattr(value, "no_such_field")):
            with pytest.raises(dataclasses.FrozenInstanceError, match="no_such_field"):
                change(empty)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """An output, and a stream's deltas."""
    llm = LLM(write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive"))
    embeds = torch.randn(16, MODEL.decoder.hidden_size)
    prompt = {"prompt_token_ids": [1, -200, 5, 99, 6], "multi_modal_data": {"image_embeds": embeds}}
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2)
    return [*llm.generate(prompt, params, use_tqdm=False), *llm.stream(prompt, params)]


def values(outputs: list[Any]) -> Iterator[Any]:
    yield SamplingParams(stop=["a"], seed=3, stop_token_ids=[4])
    yield MODEL
    yield SHAPES["tiny"].model("float32")
    yield from (getattr(MODEL, field.name) for field in dataclasses.fields(MODEL))
    yield EagerDpn(MODEL).config
    options = EngineOptions(reduce=["fastv:k=2,ratio=0.5"])
    yield options
    yield resolve(MODEL, options)
    for output in outputs:
        yield output
        yield from (() if isinstance(output, StreamDelta) else (output.pyramid, output.metrics, *output.outputs))


def test_values_are_copied_and_pickled(outputs: list[Any]) -> None:
    for value in values(outputs):
        for copied in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert type(copied) is type(value) and copied == value
            if isinstance(value, StreamDelta):
                assert [getattr(copied, name) for name in value.__slots__] == [
                    getattr(value, name) for name in value.__slots__
                ]
        if dataclasses.is_dataclass(value):
            assert dataclasses.replace(value) == value  # type: ignore[type-var]


def test_values_with_tensors_are_copied_and_pickled() -> None:
    model, ids = EagerDpn(MODEL).eval(), [1, -200, 5, 99, 6]
    embeds = torch.randn(16, MODEL.decoder.hidden_size)
    made = model(ids, image_embeds=embeds, labels=torch.tensor(ids))
    for copied in (copy.copy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert isinstance(copied, EagerOutput) and torch.equal(copied.logits, made.logits)
        assert copied.trace.experts == made.trace.experts
    generated = model.generate(ids, image_embeds=embeds, max_new_tokens=2)
    assert copy.deepcopy(generated).token_ids == pickle.loads(pickle.dumps(generated)).token_ids == generated.token_ids


ERRORS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DpnError)]


@pytest.mark.parametrize("cls", ERRORS)
def test_errors_are_copied_and_pickled(cls: type[DpnError]) -> None:
    error = BatchError({1: RequestError("n=0")}, [1, None]) if cls is BatchError else cls("what was wrong")
    for copied in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(copied) is cls and str(copied) == str(error)
    if isinstance(error, BatchError):
        again = pickle.loads(pickle.dumps(error))
        assert str(again.errors[1]) == "n=0" and again.outputs == [1, None]


@pytest.mark.parametrize("name", ["max_token", "best_of", "logit_bias", "guided_decoding", "detokenize"])
def test_an_unknown_sampling_parameter_is_named(name: str) -> None:
    known = ", ".join(field.name for field in dataclasses.fields(SamplingParams))
    with pytest.raises(RequestError) as raised:
        SamplingParams(temperature=0, **{name: 1})  # type: ignore[arg-type]
    assert str(raised.value) == f"SamplingParams has no argument '{name}': expected {known}"
    with pytest.raises(RequestError, match=f"no argument '{name}'"):
        dataclasses.replace(SamplingParams(), **{name: 1})  # type: ignore[arg-type]
    assert list(inspect.signature(SamplingParams).parameters) == known.split(", ")


@pytest.mark.parametrize("name", ["model", "pipeline_parallel_size", "trust_remote_code"])
def test_an_unknown_argument_of_an_engine_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^LLM has no argument '{name}': expected engine_dir, device, max_num_seqs, "
    ):
        LLM(tmp_path, **{name: 1})  # type: ignore[arg-type]
