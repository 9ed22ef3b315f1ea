"""A caller's `torch.set_default_device` concerns its own tensors: those of the runtime say where they are."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.outputs import RequestOutput
from tests.engine.models import MODEL, random_images, random_prompt, write_random_engine

ROOT = Path(__file__).parents[1]
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros", "Generator",
}  # fmt: skip
LIKE_TORCH = ("dpn_rt/reference", "dpn_rt/training")
"""Models of torch, which are made on the default device like others."""


def tensors_without_a_device(source: str) -> Iterator[int]:
    """Lines that make one."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_factory = ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
        if is_factory and not any(keyword.arg in ("device", None) for keyword in node.keywords):
            yield node.lineno


def test_every_tensor_says_its_device() -> None:
    assert list(tensors_without_a_device("import torch\ntorch.zeros(1)\ntorch.ones(1, device=d)\nnp.zeros(1)")) == [2]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("dpn_rt", "builders")
        for path in (ROOT / folder).rglob("*.py")
        if not str(path.relative_to(ROOT)).startswith(LIKE_TORCH)
        for line in tensors_without_a_device(path.read_text())
    ]
    assert not found


def answers(engine: Path, prompts: list[Any], **options: Any) -> list[RequestOutput]:
    drawn = SamplingParams(
        seed=5, max_tokens=6, min_tokens=2, top_p=0.8, top_k=9, min_p=0.01, n=2, logprobs=2,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
    )  # fmt: skip
    params = [SamplingParams(temperature=0, max_tokens=6, logprobs=1), drawn]
    llm = LLM(engine, device="cpu", **options)
    return llm.generate(prompts, [params[i % 2] for i in range(len(prompts))], use_tqdm=False)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {"max_chunk_tokens": 16}),
        (
            dataclasses.replace(MODEL, dtype="bfloat16", reduction=NoReduction()),
            {"reduce": "divprune:keep=0.6+fastv:k=2,ratio=0.5"},
        ),
    ],
)
def test_another_default_device_changes_no_answer(tmp_path: Path, model: ModelConfig, options: dict[str, Any]) -> None:
    random = np.random.default_rng(torch.initial_seed())
    prompts = [random_prompt(random, grid) for grid in ((4, 4), (6, 5), None)]
    (image,) = random_images(1)
    prompts += [{**random_prompt(random, (4, 4)), "multi_modal_data": {"image": image}}]
    engine = write_random_engine(tmp_path / "e", model)
    expected = answers(engine, prompts, **options)
    with torch.device("meta"):
        found = answers(engine, prompts, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.pyramid.experts == other.pyramid.experts
        for got, wanted in zip(one.outputs, other.outputs, strict=True):
            assert got.token_ids == wanted.token_ids and got.logprobs == wanted.logprobs
