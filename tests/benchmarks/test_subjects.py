"""What the subjects of the latency benchmark time, and on which device their inputs are."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import latency, limits, measure, subjects
from benchmarks.dense_llava import dense_llava
from benchmarks.measure import make_requests
from benchmarks.rows import Row, plan
from benchmarks.shapes import SHAPES, random_weights
from benchmarks.subjects import Runtime, TransformersDense
from dpn_rt import LLM
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.settings import EngineOptions

TINY = SHAPES["tiny"].model("float32")
GPU = "cuda:0"
"""With its number, which a torch without CUDA cannot look up."""
TWO = Row("dpn_rt", "222", 2, ((2, 2, 2),) * 2)


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that were waited for, instead of waiting."""
    devices: list[str] = []
    monkeypatch.setattr(subjects, "synchronize", lambda device: devices.append(str(device)))
    return devices


def move(model: nn.Module) -> None:
    """Fake parameters and buffers on a GPU; `Module.to` cannot replace a parameter by a fake one."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=GPU)


def test_requests_of_the_host_reach_a_model_on_a_gpu(synchronized: list[str]) -> None:
    """Fake tensors of a GPU refuse those of the host, as a GPU does, and compute nothing."""
    dense = dense_llava(TINY, dict(random_weights(TINY, device="meta")))
    with FakeTensorMode():
        move(dense)
        requests = make_requests(TINY, TWO)
        assert {request.image_embeds.device.type for request in requests} == {"cpu"}
        timing = TransformersDense(dense).run(requests, 1)
    assert timing.kv_rows == 2 * TINY.decoder.num_layers * 640
    assert set(synchronized) == {GPU}


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
    assert events[:first].count("prompt") == 2 and events[:first].count("hash") == 4  # rows and pixels of two requests
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
