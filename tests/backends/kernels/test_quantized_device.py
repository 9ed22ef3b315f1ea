"""Engines in 8 bits with the runtime for GPUs: matrices row by row, products in three launches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.outputs import RequestOutput
from dpn_rt.schema.dtypes import Quantize
from dpn_rt.settings import EngineOptions
from tests.backends.kernels.launches import counted_launches
from tests.builders.test_quantized_samples import relative
from tests.engine.models import MODEL, random_prompt, with_decoder
from tests.engine.quantized_models import quantized_weights, write_quantized_engine
from tests.places import HAS_GPU, Place
from tests.skips import GPU_PRESENT

PARAMS = SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
WHOLE = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)
FORMS = pytest.mark.parametrize("quantize", ["int8", "fp8"])


def model_of(place: Place, quantize: Quantize, **changes: Any) -> ModelConfig:
    return with_decoder(replace(MODEL, dtype=place.dtype, quantize=quantize), **changes)


@pytest.fixture
def place(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    if place.device is not None:
        monkeypatch.setattr(place.device, "row_major", True, raising=False)
    return place


@pytest.fixture
def quick(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch takes long for a small product of 8-bit floats; `test_row_major.py` tests it."""
    if place.device is not None:

        def multiply(x: Tensor, weight: Tensor, *scales: Tensor, out_dtype: torch.dtype) -> Tensor:
            assert all(scale == 1 for scale in scales) and out_dtype == torch.float32
            return x.float() @ weight.float()

        monkeypatch.setattr(torch, "_scaled_mm", multiply)


def prompts(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(torch.initial_seed() % 2**32)
    return [random_prompt(random, grid) for grid in [(4, 4), None, (2, 4), (6, 3), None][:count]]


def routed(asked: list[dict[str, Any]], outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    """The prompts, each with the route that its output took."""
    return [
        prompt | ({"route": output.pyramid.experts} if "multi_modal_data" in prompt else {})
        for prompt, output in zip(asked, outputs, strict=True)
    ]


def assert_same(actual: RequestOutput, expected: RequestOutput, tolerance: float) -> None:
    """Log-probabilities of the first token: what comes later may rest on a choice between two near ones."""
    found, wanted = (output.outputs[0].logprobs[0] for output in (actual, expected))  # type: ignore[index]
    assert actual.pyramid.experts == expected.pyramid.experts
    for token, logprob in wanted.items():
        if token in found:
            assert found[token].logprob == pytest.approx(logprob.logprob, abs=tolerance)


def first_logprobs(output: RequestOutput) -> Tensor:
    """`[1, vocab_size]`, of the first token."""
    entry = output.outputs[0].logprobs[0]  # type: ignore[index]
    return torch.tensor([[entry[token].logprob for token in range(len(entry))]])


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_int8_equals_the_cpu(place: Place, tmp_path: Path, tied: bool) -> None:
    """Products give the same bits, in tiles and row by row; an activation may differ in its last."""
    engine = write_quantized_engine(tmp_path / "engine", model_of(place, "int8", tie_word_embeddings=tied))
    asked = prompts(5)
    expected = LLM(engine, device="cpu").generate(asked, PARAMS, use_tqdm=False)
    if place.device is None:  # in bfloat16 a router with two nearly equal probabilities may choose the other expert
        asked = routed(asked, expected)
    actual = place.load(engine).generate(asked, PARAMS, use_tqdm=False)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, place.tolerance)
        if place.device is not None:
            assert one.outputs[0].token_ids == other.outputs[0].token_ids


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_fp8_is_near_what_its_weights_stand_for(place: Place, tmp_path: Path, tied: bool) -> None:
    """On the CPU rows are not rounded. With the expert that the CPU took: a near choice may fall otherwise."""
    engine = write_quantized_engine(tmp_path / "engine", model_of(place, "fp8", tie_word_embeddings=tied))
    asked = prompts(5)
    expected = LLM(engine, device="cpu").generate(asked, WHOLE, use_tqdm=False)
    found = place.load(engine).generate(routed(asked, expected), WHOLE, use_tqdm=False)
    for one, other in zip(found, expected, strict=True):
        assert 0 < relative(first_logprobs(one), first_logprobs(other)) < 0.35


@pytest.mark.usefixtures("quick")
@FORMS
def test_a_batch_equals_each_alone(place: Place, tmp_path: Path, quantize: Quantize) -> None:
    engine = write_quantized_engine(tmp_path / "engine", model_of(place, quantize))
    llm = place.load(engine)
    asked = prompts(4)
    tolerance = place.tolerance if quantize == "int8" else 0.1  # another order of sums may round a number otherwise
    for prompt, together in zip(asked, llm.generate(asked, PARAMS, use_tqdm=False), strict=True):
        route = {"route": together.pyramid.experts} if "multi_modal_data" in prompt else {}
        assert_same(llm.generate(prompt | route, PARAMS, use_tqdm=False)[0], together, tolerance)


@pytest.mark.usefixtures("quick")
@FORMS
def test_given_weights(place: Place, quantize: Quantize) -> None:
    model = model_of(place, quantize, tie_word_embeddings=True)
    options = EngineOptions(max_num_seqs=2, max_graph_rows=16)
    llm = LLM.from_weights(model, quantized_weights(model), "cuda", options)
    output = llm.generate({"prompt_token_ids": [3, 4, 5]}, PARAMS, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 5


@FORMS
@pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)  # counts launches on the host that stands in for a GPU
def test_every_product_of_a_decode_step_is_of_rows_in_8_bits(
    place: Place, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three launches each: four products of each layer, and the output layer; no other product."""
    engine = write_quantized_engine(tmp_path / "engine", model_of(place, quantize))
    llm = place.load(engine, max_graph_rows=0)
    step = llm.engine.runner.backend._step  # type: ignore[attr-defined]
    with torch.inference_mode(), counted_launches(monkeypatch) as launches:
        step._graphs[4]._step()
    num_products = 4 * MODEL.decoder.num_layers + 1
    library = "_int_mm" if quantize == "int8" else "_scaled_mm"
    assert {name: launches.counts[name] for name in ("quantize", library, "dequantize")} == {
        "quantize": num_products,
        library: num_products,
        "dequantize": num_products,
    }
    assert not {"product", "mm", "linear", "addmm", "matmul"} & set(launches.counts)


def test_4_bits_are_refused(place: Place, tmp_path: Path) -> None:
    engine = write_quantized_engine(tmp_path / "engine", replace(MODEL, quantize="int4"))
    with pytest.raises(
        ConfigError, match="weights are int4, which runs on the CPU alone, expected one of none, int8, fp8"
    ):
        place.load(engine)
