"""What the subjects of the latency benchmark time, and on which device their inputs are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import latency
from benchmarks.comparison import measure, subjects
from benchmarks.comparison.measure import make_requests
from benchmarks.comparison.rows import Row, plan
from benchmarks.comparison.subjects import Request, Runtime, TransformersDense
from benchmarks.measuring import limits
from benchmarks.models.dense_llava import dense_llava
from benchmarks.models.shapes import SHAPES, random_weights
from dpn_rt import LLM
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.settings import EngineOptions

TINY = SHAPES["tiny"].model("float32")
GPU = "meta"
"""torch's device without data in place of a GPU: it refuses operands on the host, and needs no torch with CUDA."""
TWO = Row("dpn_rt", "222", 2, ((2, 2, 2),) * 2)


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that were waited for, instead of waiting."""
    devices: list[str] = []
    monkeypatch.setattr(subjects, "synchronize", lambda device: devices.append(str(device)))
    return devices


class FakeLlava(nn.Module):
    """What a subject calls of transformers' model, on a GPU that computes nothing and refuses tensors of the host."""

    dtype, device = torch.float32, torch.device(GPU)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = (nn.Parameter(torch.empty(*shape, device=GPU)) for shape in ((8, 4), (1,)))
        self.rows: list[tuple[int, ...]] = []

    def get_image_features(self, pixel_values: torch.Tensor, **_: object) -> torch.Tensor:
        return pixel_values * self.scale

    def get_input_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: functional.embedding(ids, self.table)

    def forward(
        self, inputs_embeds: torch.Tensor | None = None, input_ids: torch.Tensor | None = None, **_: object
    ) -> SimpleNamespace:
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        self.rows.append(tuple(x.shape))
        return SimpleNamespace(logits=x * self.scale)


def test_requests_of_the_host_reach_a_model_on_a_gpu(synchronized: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersDense, "num_layers", 1)
    given, place = [], TransformersDense._rows

    def rows(self: TransformersDense, ids: list[list[int]], embeds: torch.Tensor) -> torch.Tensor:
        given.append((embeds.device.type, tuple(embeds.shape)))  # a write from the host would be allowed
        return place(self, ids, embeds)

    monkeypatch.setattr(TransformersDense, "_rows", rows)
    ids = [1, IMAGE_PLACEHOLDER_ID, 2]
    requests = [Request(ids, torch.randn(3, 2, 2), torch.randn(5, 4), None) for _ in range(2)]
    model = FakeLlava()
    TransformersDense(model).run(requests, 3)  # type: ignore[arg-type]
    assert given == [(GPU, (2, 5, 4))]
    assert model.rows == [(2, 7, 4), (2, 1, 4), (2, 1, 4), (2, 1, 4)]
    assert set(synchronized) == {GPU}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_transformers_gets_its_cache_by_its_present_name() -> None:
    requests = make_requests(TINY, TWO)
    timing = TransformersDense(dense_llava(TINY, dict(random_weights(TINY)))).run(requests, 2)
    num_rows = len(requests[0].token_ids) - 1 + len(requests[0].image_embeds)
    assert timing.kv_rows == 2 * num_rows * TINY.decoder.num_layers


def test_the_hosts_work_on_a_prompt_is_done_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM.from_weights(TINY, random_weights(TINY), "cpu", EngineOptions(max_num_seqs=2))
    runtime, events = Runtime(llm, TINY, "cpu"), []
    process, digest = llm.processor.process, hashlib.sha256

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (events.append(name), function(*args, **kwargs))[1]

    monkeypatch.setattr(llm.processor, "process", noted("prompt", process))
    monkeypatch.setattr(hashlib, "sha256", noted("hash", digest))
    monkeypatch.setattr(subjects, "Clock", noted("clock", subjects.Clock))
    timing = runtime.run(make_requests(TINY, TWO), 1)
    first = events.index("clock")
    assert events[:first].count("prompt") == 2 and events[:first].count("hash") == 2  # pixels of two requests
    assert set(events[first:]) == {"clock"}
    assert timing.stages is not None and len(timing.stages) == 4 and min(timing.stages) > 0


def test_rows_given_on_the_device_are_those_of_the_request() -> None:
    llm = LLM.from_weights(TINY, random_weights(TINY), "cpu")
    request = make_requests(TINY, TWO)[0]
    prompt = Runtime(llm, TINY, "cpu").prompt(request)
    (plain,) = llm.processor.process(
        {"prompt_token_ids": request.token_ids, "multi_modal_data": {"image_embeds": request.image_embeds}}
    ).images
    (image,) = prompt.images
    assert image.embeds is not None and image.embeds.data_ptr() == request.image_embeds.data_ptr()
    assert (image.key, image.segments, image.num_rows) == (plain.key, plain.segments, plain.num_rows)


def test_weights_are_made_where_they_are_wanted() -> None:
    made, spec = dict(random_weights(TINY, device="meta")), weight_spec(TINY)
    assert {tensor.device.type for tensor in made.values()} == {"meta"}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()} == {
        name: (each.shape, each.dtype) for name, each in spec.items()
    }


def test_latency_needs_no_engine_where_weights_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--shape", "tiny", "--subjects", "transformers", "dpn_rt", "--reduce", "fastv:k=2,ratio=0.5"]
    arguments += ["--batch", "1", "--repeats", "1", "--tokens", "1", "--device", "cuda"]
    options = latency.parse_arguments(arguments)
    assert measure.is_in_memory(options)
    assert not measure.is_in_memory(latency.parse_arguments([*arguments, "--tensorrt"])), "plans are files"
    assert not measure.is_in_memory(latency.parse_arguments([*arguments[:-1], "cpu"]))
    options.device = "cpu"
    monkeypatch.setattr(measure, "is_in_memory", lambda _: True)
    monkeypatch.setattr(measure, "write_engine", None)
    for size in ("READ_BYTES", "MIN_GEMM_WEIGHT_BYTES"):
        monkeypatch.setattr(limits, size, 1 << 20)
    rows = [(row["subject"], row["routes"]) for row in measure.measure(options)["rows"]]
    assert rows[:3] == [("transformers", "dense"), ("dpn_rt", "dense"), ("dpn_rt", "222")]
    assert rows[3:] == [("reduced", "dense"), ("reduced", "fastv:k=2,ratio=0.5")]


def test_eager_rows_end_at_the_batch_that_is_given() -> None:
    options = latency.parse_arguments(
        ["--subjects", "eager", "dpn_rt", "--batch", "1", "8", "32", "--eager-batch", "8"]
    )
    rows = plan(options)
    assert [row.batch for row in rows if row.subject == "eager"] == [1, 8]
    assert {row.batch for row in rows if row.subject == "dpn_rt"} == {1, 8, 32}
