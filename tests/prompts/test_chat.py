"""Conversations become the prompts that the models were trained on."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_rt.errors import RequestError
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.prompts.chat import VICUNA_SYSTEM
from tests.prompts.conftest import Setup

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8))
IMAGE = {"type": "image", "image": PICTURE}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def data_url(image: Image.Image = PICTURE) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_the_vicuna_template(original: Setup) -> None:
    prompt = original.processor.chat([user(text("What is it?"), IMAGE)])
    assert prompt["prompt"] == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it?<ROUTER> ASSISTANT:"
    )
    assert prompt["multi_modal_data"]["image"] is PICTURE
    assert original.processor.process(prompt).images


def test_several_turns(original: Setup) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user(IMAGE, text("One?")),
        assistant("Yes."),
        user(text("Two?")),
    ]
    prompt = original.processor.chat(messages)["prompt"]
    assert prompt == "Be brief. USER: <image>\nOne?<ROUTER> ASSISTANT: Yes.</s>USER: Two?<ROUTER> ASSISTANT:"
    late = [{"role": "user", "content": "Hello"}, assistant("Hi."), user(IMAGE, text("Two?"))]
    prompt = original.processor.chat(late)
    assert prompt["prompt"].endswith("USER: Hello ASSISTANT: Hi.</s>USER: <image>\nTwo?<ROUTER> ASSISTANT:")
    original.processor.process(prompt)


def test_no_router_token_without_image_or_for_other_models(original: Setup) -> None:
    assert original.processor.chat([user(text("Hello"))]) == {"prompt": f"{VICUNA_SYSTEM} USER: Hello ASSISTANT:"}
    dense = original.with_model(reduction=NoReduction())
    assert "<ROUTER>" not in dense.chat([user(IMAGE, text("Hello"))])["prompt"]


def test_what_the_text_says_itself_is_not_doubled(original: Setup) -> None:
    prompt = original.processor.chat([user(IMAGE, text("Look: <image>\nWhat?<ROUTER>"))])["prompt"]
    assert prompt.endswith("USER: Look: <image>\nWhat?<ROUTER> ASSISTANT:")


def test_the_tokenizers_template(huggingface: Setup) -> None:
    prompt = huggingface.processor.chat([user(IMAGE, text("What is it?"))])
    assert prompt["prompt"] == "USER: <image>\nWhat is it?<ROUTER> ASSISTANT:"
    huggingface.processor.process(prompt)


def test_a_data_url(original: Setup) -> None:
    for url in ({"url": data_url()}, data_url()):
        prompt = original.processor.chat([user({"type": "image_url", "image_url": url}, text("What?"))])
        np.testing.assert_array_equal(np.asarray(prompt["multi_modal_data"]["image"]), np.asarray(PICTURE))


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages: expected a list"),
        ("hello", "messages: expected a list"),
        (["hello"], r'messages\[0\]: expected a dict with "role" and "content"'),
        ([{"role": "user"}], r"messages\[0\]: expected a dict"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]: role 'tool'"),
        ([user(text("a")), {"role": "system", "content": "x"}], r"messages\[1\]: role 'system'"),
        ([assistant("a")], "the last one has role assistant, expected user"),
        ([{"role": "user", "content": 3}], "content is int"),
        ([user({"type": "video"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user({"type": "text"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user({"type": "image"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user(IMAGE, IMAGE, text("a"))], "got 2 images: one image per request for now"),
        ([user(IMAGE, text("a")), assistant("b"), user(IMAGE, text("c"))], "one image per request for now"),
        (
            [{"role": "system", "content": [IMAGE]}, user(text("a"))],
            r"messages\[0\]: an image in a message of role system",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})],
            "is not fetched, expected a data: URL",
        ),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png,abc"}})], "base64"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}})], "base64 data is damaged"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}})], "not an image"),
        ([user({"type": "image_url"})], "url None is not fetched"),
        ([user(text(" "))], r"messages\[0\]: empty"),
        ([user(text("a")), assistant("b"), {"role": "user", "content": ""}], r"messages\[2\]: empty"),
    ],
)
def test_refusals(original: Setup, messages: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        original.processor.chat(messages)
