"""Outputs as plain values, and as pictures."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from PIL import Image, ImageChops

from dpn_rt import LLM, SamplingParams
from dpn_rt.drawing import draw_pyramid
from dpn_rt.errors import StepError
from dpn_rt.outputs import CompletionOutput, Pyramid, RequestOutput
from tests.engine.models import MODEL, write_random_engine
from tests.test_drawing import FASTV, PYRAMID, ranked


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> RequestOutput:
    llm = LLM(write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive"))
    embeds = torch.randn(16, MODEL.decoder.hidden_size)
    prompt = {"prompt_token_ids": [1, -200, 5, 99, 6], "multi_modal_data": {"image_embeds": embeds}}
    return llm.generate(prompt, SamplingParams(temperature=1, seed=3, max_tokens=3, logprobs=2, n=2), use_tqdm=False)[0]


def test_to_dict_has_every_field_as_json(output: RequestOutput) -> None:
    made = output.to_dict()
    assert json.loads(json.dumps(made)) == made
    assert list(made) == [field.name for field in dataclasses.fields(RequestOutput)]
    assert [list(each) for each in made["outputs"]] == [
        [field.name for field in dataclasses.fields(CompletionOutput)]
    ] * 2
    assert list(made["pyramid"]) == [field.name for field in dataclasses.fields(Pyramid)]
    assert made["prompt_token_ids"] == output.prompt_token_ids and made["error"] is None
    assert made["pyramid"]["visual_tokens"] == output.pyramid.visual_tokens
    assert made["metrics"]["latency"] == output.metrics.latency
    assert output.pyramid.flops is not None and made["pyramid"]["flops"]["saved"] == output.pyramid.flops.saved


def test_to_dict_has_log_probabilities(output: RequestOutput) -> None:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    made = output.to_dict()["outputs"][0]["logprobs"]
    for position, (token, given) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert set(made[position]) == {str(key) for key in given}
        assert made[position][str(token)] == {
            "logprob": float(given[token]),
            "rank": given[token].rank,
            "decoded_token": None,
        }


def test_to_dict_tells_an_error(output: RequestOutput) -> None:
    made = dataclasses.replace(output, error=StepError("it failed")).to_dict()
    assert made["error"] == {"type": "StepError", "message": "it failed"} and json.dumps(made)


def test_a_pyramid_draws_itself() -> None:
    image = Image.new("RGB", (40, 40), (0, 200, 0))
    kept = ranked([(1, FASTV)], [[3, 8]], [16, 2], [(1, 1), (1, 1)])
    for pyramid in (PYRAMID, kept):
        made = pyramid.draw(image, 100, "What?", "That.")
        assert ImageChops.difference(made, draw_pyramid(image, pyramid, 100, "What?", "That.")).getbbox() is None
        assert pyramid.draw(image).size[0] > 4 * 100


def test_a_notebook_shows_the_cells() -> None:
    png = PYRAMID._repr_png_()
    assert png is not None
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG" and picture.size == PYRAMID.draw(Image.new("RGB", (1, 1))).size
    assert Pyramid([], [], [], [], [], [])._repr_png_() is None
