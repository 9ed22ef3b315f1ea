"""The model of lmms-eval gives the answers of `LLM.chat`, whatever the batch; its package has a stand-in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import ConfigError, EvaluationError, RequestError
from dpn_rt.integrations.lmms_eval_options import batch_size, sampling_params
from examples.tiny_dpn.data import sample

TASK, SPLIT = "scenes", "test"
Content = list[dict[str, Any]]


def image(scene: int) -> dict[str, Any]:
    return {"type": "image", "url": sample("test", scene).image}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


DOCS: list[Content] = [
    *([image(scene), text(sample("test", scene).questions[kind].text)] for scene in range(3) for kind in (0, 3, 7)),
    [text("hello")],
    [image(0), text("What is different?"), image(1)],
]
"""The messages of documents: one picture, none, and several."""


@dataclass
class Request:
    """lmms-eval's `Instance`, as far as a model reads it."""

    args: tuple[Any, ...]


def requests(options: Any, opened: Callable[[int], object] = lambda _: None) -> list[Request]:
    def messages(doc: int) -> list[dict[str, Any]]:
        opened(doc)
        return [{"role": "user", "content": DOCS[doc]}]

    return [Request(("unused", messages, options, doc, TASK, SPLIT)) for doc in range(len(DOCS))]


def model_of(module: ModuleType, engine_dir: Path, **options: Any) -> Any:
    model = module.DpnRt(engine_dir, **options)
    model.task_dict[TASK] = {SPLIT: range(len(DOCS))}
    return model


def expected(llm: LLM, doc: int, **params: Any) -> str:
    content = [{"type": "image", "image": part["url"]} if part["type"] == "image" else part for part in DOCS[doc]]
    return llm.chat([{"role": "user", "content": content}], SamplingParams(**params))[0].outputs[0].text


@pytest.mark.parametrize("size", [1, 4, "auto"])
def test_answers_keep_the_order_of_the_requests(lmms_eval: ModuleType, engine_dir: Path, llm: LLM, size: Any) -> None:
    model = model_of(lmms_eval, engine_dir, batch_size=size)
    answers = model.generate_until(requests({"max_new_tokens": 8}))
    assert answers == [expected(llm, doc, temperature=0, max_tokens=8) for doc in range(len(DOCS))]
    assert len(set(answers)) > 4, "different questions have different answers"


def test_requests_run_in_one_batch(lmms_eval: ModuleType, engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, together, opened = model_of(lmms_eval, engine_dir, batch_size=3), [], []
    engine = model._llm.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (step(), together.append((engine.num_running, len(opened))))[0])
    model.generate_until(requests({"max_new_tokens": 8}, opened.append))
    assert max(running for running, _ in together) == 3
    assert together[0][1] < len(DOCS), "the last documents are not opened at the start"
    assert opened == list(range(len(DOCS)))


def test_images_may_be_files_and_messages_texts(
    lmms_eval: ModuleType, engine_dir: Path, llm: LLM, tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    DOCS[0][0]["url"].save(path)
    model = model_of(lmms_eval, engine_dir)
    contents: list[Any] = [[{"type": "image", "url": str(path)}, DOCS[0][1]], "hello"]
    asked = [
        Request(("", lambda _, content=content: [{"role": "user", "content": content}], None, 0, TASK, SPLIT))
        for content in contents
    ]
    model._max_new_tokens = 8
    assert model.generate_until(asked) == [expected(llm, doc, temperature=0, max_tokens=8) for doc in (0, 9)]


def test_nothing_to_ask(lmms_eval: ModuleType, engine_dir: Path) -> None:
    assert model_of(lmms_eval, engine_dir).generate_until([]) == []


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({}, {"temperature": 0, "max_tokens": 99}),
        ({"max_new_tokens": 3, "do_sample": False, "temperature": 0, "top_p": 0}, {"temperature": 0, "max_tokens": 3}),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, {"temperature": 0, "max_tokens": 99}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5},
         {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 99}),
        ({"do_sample": True}, {"temperature": 1, "max_tokens": 99}),
        ({"temperature": None, "top_p": None, "until": None, "num_beams": None}, {"temperature": 0, "max_tokens": 99}),
        ({"until": "\n\n"}, {"temperature": 0, "max_tokens": 99, "stop": "\n\n"}),
        ({"until": ["a", "b"], "stop_sequences": ["c"]}, {"temperature": 0, "max_tokens": 99, "stop": ["a", "b", "c"]}),
        ({"until": [], "image_aspect_ratio": "pad", "seed": 0}, {"temperature": 0, "max_tokens": 99, "seed": 0}),
        ({"repetition_penalty": 1.2, "skip_special_tokens": False},
         {"temperature": 0, "max_tokens": 99, "repetition_penalty": 1.2, "skip_special_tokens": False}),
    ],
)  # fmt: skip
def test_options_of_tasks(options: dict[str, Any], params: dict[str, Any]) -> None:
    assert sampling_params(options, 99) == SamplingParams(**params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4: beam search is not supported, expected 1"),
        ({"max_tokens": 4}, "generation_kwargs has 'max_tokens': expected one of until, "),
        ({"max_new_tokens": 0}, "max_tokens=0: expected at least 1"),
        ({"until": [""]}, "expected non-empty strings"),
        ({"until": 3}, "stop=.*: expected a string or a list of strings"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
    ],
)
def test_options_that_are_refused(
    lmms_eval: ModuleType, engine_dir: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        sampling_params(options, 99)
    with pytest.raises(EvaluationError, match=f"task 'scenes', document 0: .*{message}"):
        model_of(lmms_eval, engine_dir).generate_until(requests(options))


def test_until_ends_an_answer(lmms_eval: ModuleType, engine_dir: Path, llm: LLM) -> None:
    whole = expected(llm, 0, temperature=0, max_tokens=8)
    until = whole[len(whole) // 2]
    answers = model_of(lmms_eval, engine_dir).generate_until(requests({"max_new_tokens": 8, "until": ["never", until]}))
    assert answers[0] == whole[: whole.index(until)] != whole


def test_sampling_with_a_seed(lmms_eval: ModuleType, engine_dir: Path, llm: LLM) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "seed": 3}
    answers = model_of(lmms_eval, engine_dir, batch_size=4).generate_until(requests(options))
    assert answers == [expected(llm, doc, temperature=1.5, seed=3, max_tokens=8) for doc in range(len(DOCS))]


def test_a_failing_document_is_named(lmms_eval: ModuleType, engine_dir: Path) -> None:
    model = model_of(lmms_eval, engine_dir, batch_size=4)

    def video(doc: int) -> list[dict[str, Any]]:
        part = {"type": "video", "url": "a.mp4"} if doc == 5 else text("hello")
        return [{"role": "user", "content": [part]}]

    asked = [Request(("", video, {"max_new_tokens": 2}, doc, TASK, SPLIT)) for doc in range(8)]
    with pytest.raises(EvaluationError, match="^task 'scenes', document 5: a part of type 'video': expected text or "):
        model.generate_until(asked)
    assert model._llm.engine.num_unfinished == 0, "what still ran is given up"
    assert len(model.generate_until(asked[:5])) == 5


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round", "generate_visual_cot"])
def test_other_requests_are_refused_by_name(lmms_eval: ModuleType, engine_dir: Path, kind: str) -> None:
    with pytest.raises(EvaluationError, match=f"{kind}.* not supported: expected generate_until tasks"):
        getattr(model_of(lmms_eval, engine_dir), kind)([])


class Recorded:
    """Keeps the arguments of `LLM`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


@pytest.mark.parametrize(
    ("model_args", "others", "given"),
    [
        ("engine=e,batch_size=8", {"batch_size": 1, "device": None, "max_batch_size": None}, {"max_num_seqs": 8}),
        ("engine=e", {"batch_size": "4"}, {"max_num_seqs": 4}),
        ("engine=e", {"batch_size": "auto:4"}, {"max_num_seqs": 64}),
        ("engine=e,batch_size=auto", {"max_batch_size": 16}, {"max_num_seqs": 16}),
        ("engine=e,max_model_len=512", {}, {"max_model_len": 512, "max_num_seqs": 64}),
        ('engine=e,reduce="fastv:k=2,ratio=0.5"', {}, {"reduce": "fastv:k=2,ratio=0.5"}),
        ("engine='e',reduce='pool:kernel=2x2'", {}, {"reduce": "pool:kernel=2x2"}),
        ("engine=e,reduce=none", {}, {"reduce": "none"}),
    ],
)
def test_options_of_the_command_line(
    lmms_eval: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    model_args: str,
    others: dict[str, Any],
    given: dict[str, Any],
) -> None:
    monkeypatch.setattr(lmms_eval, "LLM", Recorded)
    made = lmms_eval.DpnRt.create_from_arg_string(model_args, others)._llm
    assert made.args == ("e", "auto")
    assert {name: made.kwargs[name] for name in given} == given
    assert not lmms_eval.DpnRt.is_simple, "requests come as messages"


@pytest.mark.parametrize("value", [0, -1, "0", "many", "", "1.5", "²", "auto4", True])
def test_sizes_of_batches_that_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size=.*: expected a number of 1 or more, or auto$"):
        batch_size(value)


def test_arguments_that_are_refused(lmms_eval: ModuleType, engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="DpnRt has no argument 'batchsize': expected engine, device, batch_size"):
        lmms_eval.DpnRt.create_from_arg_string("engine=e,batchsize=8", {})
    with pytest.raises(ConfigError, match="--model_args names no engine: expected engine=DIR"):
        lmms_eval.DpnRt.create_from_arg_string("batch_size=8", {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE='2': one process runs all requests, expected 1"):
        model_of(lmms_eval, engine_dir)
