"""Weights that are copied from the engine's file into huge pages, or mapped."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM
from dpn_rt.backends.kernels import loading
from dpn_rt.device import huge_pages
from dpn_rt.engine import loader
from dpn_rt.errors import CapacityError
from dpn_rt.format.engine_dir import WEIGHTS
from dpn_rt.settings import EngineOptions
from tests.engine.answers import GREEDY, all_logprobs
from tests.engine.models import MODEL, random_prompt, random_weights, write_random_engine
from tests.engine.quantized_models import write_quantized_engine


def is_mapped(engine: Path) -> bool:
    gc.collect()
    return str((engine / WEIGHTS).resolve()) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_answers_are_the_same(tmp_path: Path, form: Any) -> None:
    engine = tmp_path / "e"
    if form in ("int8", "int4"):
        write_quantized_engine(engine, dataclasses.replace(MODEL, quantize=form))
    else:
        write_random_engine(engine, dataclasses.replace(MODEL, dtype=form))
    prompt = random_prompt(np.random.default_rng(torch.initial_seed()), (8, 8))
    outputs = []
    for copy in (False, True):
        llm = LLM(engine, copy_weights=copy)
        assert is_mapped(engine) == (not copy)
        outputs.append(llm.generate(prompt, GREEDY, use_tqdm=False)[0])
        del llm
    mapped, copied = outputs
    assert copied.outputs[0].token_ids == mapped.outputs[0].token_ids
    assert torch.equal(all_logprobs(copied), all_logprobs(mapped))


@pytest.mark.parametrize(
    ("huge", "share", "expected"), [(True, 2.1, True), (True, 1.8, False), (False, 99.0, False)], ids=str
)
def test_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huge: bool, share: float, expected: bool) -> None:
    """Copied where the system has huge pages, and more than twice as much memory is free."""
    write_random_engine(tmp_path / "e")
    num_bytes = (tmp_path / "e" / WEIGHTS).stat().st_size  # a header of less than a tenth included
    monkeypatch.setattr(loader, "has_huge_pages", lambda: huge)
    monkeypatch.setattr(loader, "free_memory", lambda: int(share * num_bytes))
    llm = LLM(tmp_path / "e", kv_cache_bytes=2**20)
    assert is_mapped(tmp_path / "e") == (not expected)
    del llm


@pytest.mark.parametrize(("share", "expected"), [(3.1, True), (2.8, False)])
def test_a_prepacked_copy_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, expected: bool) -> None:
    write_random_engine(tmp_path / "e", dataclasses.replace(MODEL, dtype="bfloat16"))
    num_bytes = (tmp_path / "e" / WEIGHTS).stat().st_size
    monkeypatch.setattr(loader, "has_huge_pages", lambda: True)
    monkeypatch.setattr(loader, "free_memory", lambda: int(share * num_bytes))
    llm = LLM(tmp_path / "e", kv_cache_bytes=2**20, prepack_weights=True)
    assert is_mapped(tmp_path / "e") == (not expected)
    del llm


def test_eight_bit_floats_are_not_copied(tmp_path: Path) -> None:
    """They become bfloat16 in memory when they are loaded."""
    write_quantized_engine(tmp_path / "e", dataclasses.replace(MODEL, quantize="fp8"))
    llm = LLM(tmp_path / "e", copy_weights=True)
    assert is_mapped(tmp_path / "e")
    del llm


def test_given_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their owner may need them, so they are copied only when that is asked for."""
    monkeypatch.setattr(loader, "has_huge_pages", lambda: True)
    copied: list[int] = []

    def copy(weights: dict[str, torch.Tensor], *, required: bool) -> dict[str, torch.Tensor]:
        copied.append(len(weights))
        return weights

    monkeypatch.setattr(loader, "copy_weights", copy)
    weights = list(random_weights(MODEL))
    LLM.from_weights(MODEL, weights)
    assert not copied
    LLM.from_weights(MODEL, weights, options=EngineOptions(copy_weights=True))
    assert copied == [len(weights)]


def test_no_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as under `ulimit -v`: mapped unless a copy was asked for."""

    def refuse(num_bytes: int) -> torch.Tensor:
        raise MemoryError(f"{num_bytes:,} bytes")

    write_random_engine(tmp_path / "e")
    monkeypatch.setattr(huge_pages, "huge_memory", refuse)
    monkeypatch.setattr(loader, "has_huge_pages", lambda: True)
    llm = LLM(tmp_path / "e", kv_cache_bytes=2**20)
    assert is_mapped(tmp_path / "e")
    del llm
    message = r"copy_weights=True: the memory has no room for a copy of [\d,]+ bytes of weights \(%s\); expected None"
    with pytest.raises(CapacityError, match=message % r"[\d,]+ bytes"):
        LLM(tmp_path / "e", kv_cache_bytes=2**20, copy_weights=True)
    monkeypatch.setattr(loading, "free_memory", lambda: 1000)
    with pytest.raises(CapacityError, match=message % "1,000 bytes are free"):
        LLM(tmp_path / "e", kv_cache_bytes=2**20, copy_weights=True)
