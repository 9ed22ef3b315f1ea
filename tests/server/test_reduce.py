"""Reductions that requests ask for over HTTP: the same as in Python, each with its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.engine.loader import load_processor
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.reference import EagerDpn
from dpn_rt.server.engine_client.client import EngineProcess
from dpn_rt.server.engine_client.messages import EngineSource
from dpn_rt.server.reductions import Reductions
from examples.tiny_dpn import train
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.tokenizer import train_tokenizer
from tests.server.conftest import OPTIONS, Ask, RunningServer, serve
from tests.server.test_lifecycle import metrics

SPECS = ["fastv:k=2,ratio=0.5", "pyramiddrop:layers=2-3,ratios=0.5-0.2", "pool:kernel=2x2", "none"]
REDUCED = dataclasses.replace(OPTIONS, reduce=SPECS)


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reduce")
    torch.manual_seed(11)
    model = EagerDpn(model_config("dense", train_tokenizer().get_vocab_size())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    train.save_checkpoint(model, folder / "checkpoint")
    return build_engine(folder / "checkpoint", folder / "engine", dtype="float32").path


@pytest.fixture(scope="module")
def reducing(dense_dir: Path) -> Iterator[RunningServer]:
    with EngineProcess(EngineSource(dense_dir, "cpu", REDUCED)) as process:
        process.wait_until_loaded()
        running = serve(load_processor(dense_dir, "cpu", REDUCED), process, reduce=SPECS)
        yield running
        running.stop()


def test_requests_with_different_reductions(dense_dir: Path, reducing: RunningServer) -> None:
    llm = LLM(dense_dir, reduce=SPECS)
    params = SamplingParams(temperature=0, max_tokens=8)
    asked = [(Ask(scene), spec) for scene in range(3) for spec in (None, *SPECS)]
    expected = []
    for ask, spec in asked:
        prompt = {**llm.processor.chat(ask.local_messages), "reduce": spec}
        expected.append(llm.generate(prompt, params, use_tqdm=False)[0])

    def answer(pair: tuple[Ask, str | None]) -> Any:
        ask, spec = pair
        return reducing.post(ask.body(reduce=spec, max_tokens=8, temperature=0)).json()

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(answer, asked))
    for reply, output in zip(replies, expected, strict=True):
        assert reply["choices"][0]["message"]["content"] == output.outputs[0].text
        assert reply["pyramid"]["kept"] == output.pyramid.kept
        assert reply["pyramid"]["visual_tokens"] == output.pyramid.visual_tokens
        assert reply["pyramid"]["flops"]["saved"] == output.pyramid.flops.saved  # type: ignore[union-attr]
    again = reducing.post(Ask(0).body(reduce=SPECS[0], kept=expected[1].pyramid.kept, max_tokens=8, temperature=0))
    assert again.json()["choices"] == replies[1]["choices"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reduce": "fastv:k=5"}, "no boundary before layer 5"),
        ({"reduce": "sparse"}, "method 'sparse', expected one of"),
        ({"reduce": {"method": "fastv", "k": []}}, r"k=[], expected a whole number"),
        ({"reduce": 3}, "reduce"),
        ({"kept": [[1]]}, "kept[0]: 1 rows, expected"),
        ({"kept": [1] * 65}, "kept"),
        ({"reduce": "none", "kept": [[1]]}, "no reduction that keeps rows"),
    ],
)
def test_refusals(reducing: RunningServer, fields: dict[str, Any], named: str) -> None:
    reply = reducing.post(Ask(0).body(**fields))
    assert reply.status_code == 400 and named in reply.json()["error"]["message"]


def test_a_trained_model(server: RunningServer) -> None:
    reply = server.post(Ask(0).body(reduce="none", max_tokens=4)).json()
    assert len(set(reply["pyramid"]["visual_tokens"])) == 1
    refused = server.post(Ask(0).body(reduce="fastv"))
    assert refused.status_code == 400 and "trained reduction of its own" in refused.json()["error"]["message"]


def test_what_may_be_asked_for_is_listed(reducing: RunningServer, server: RunningServer) -> None:
    """What the server was started with, the default first, and what every engine can do; each with all keys."""
    listed = reducing.client.get("/v1/models").json()["data"][0]["reductions"]
    pool = "pool:kernel=2x2,layer=0,function=avg"
    assert listed == [
        *(SPECS[0], SPECS[1], pool, "none", "divprune:keep=0.1"),
        *("random:layer=0,keep=0.5,seed=0,positions=renumber", "random:layer=2,keep=0.5,seed=0,positions=renumber"),
    ]
    for spec in listed:
        reply = reducing.post(Ask(0).body(reduce=spec)).json()
        assert reply["pyramid"]["reduction"] == spec
    assert server.client.get("/v1/models").json()["data"][0]["reductions"] == []


def test_an_engine_that_was_built_dense(dense_dir: Path) -> None:
    model = load_processor(dense_dir, "cpu", OPTIONS).model
    assert Reductions.of(model, None).started == ("none",) and Reductions.of(model, None).choices[0] == "none"
    assert not any("layer=2" in spec for spec in Reductions.of(model, None).choices)
    assert Reductions.of(model, {"method": "fastv", "ratio": 0.75}).started == ("fastv:k=2,ratio=0.75",)
    assert Reductions.of(model, "pyramiddrop:layers=2,ratios=0.10").choices[0] == "pyramiddrop:layers=2,ratios=0.1"


def test_metrics_per_reduction(reducing: RunningServer) -> None:
    def counts() -> dict[str, float]:
        return {name: value for name, value in metrics(reducing).items() if "reduction_" in name}

    before = counts()
    asked = [(SPECS[0], SPECS[0]), (None, SPECS[0]), ("none", "none"), (SPECS[1], SPECS[1])]
    asked += [(f"fastv:k=2,ratio=0.{digit}", "other") for digit in (1, 2, 3)] + [("divprune", "other")]
    expected: dict[str, float] = {}
    for spec, label in asked:
        pyramid = reducing.post(Ask(0).body(reduce=spec)).json()["pyramid"]
        rows, columns = pyramid["image_grid"]
        for name, value in (
            ("requests", 1),
            ("visual_tokens_before", rows * columns),
            ("visual_tokens_after", pyramid["visual_tokens"][-1]),
            ("flops_saved", pyramid["flops"]["dense_prefill"] - pyramid["flops"]["prefill"]),
        ):
            key = f"dpn_rt:reduction_{name}_total {label}"
            expected[key] = expected.get(key, 0) + value
    reducing.post({**Ask(0).body(), "messages": [{"role": "user", "content": "Hi"}]})  # nothing to reduce
    after = counts()
    assert {name: after[name] - before.get(name, 0) for name in expected} == expected
    labels = {name.partition(" ")[2] for name in after}
    assert labels <= {parse_spec(spec, 8).spec for spec in SPECS} | {"other"}, "few labels, whatever is asked"


def test_a_trained_model_has_no_metrics_per_reduction(server: RunningServer) -> None:
    server.post(Ask(0).body(reduce="none", max_tokens=4))
    server.post(Ask(0).body(max_tokens=4))
    assert not any("reduction_requests" in name for name in metrics(server))
