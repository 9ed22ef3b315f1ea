"""Conversations become prompts in the form that the models were trained on."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpn_rt.errors import RequestError
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.prompts.markers import Typed
from dpn_rt.prompts.processor import Processor
from dpn_rt.prompts.template import VICUNA_SYSTEM
from tests.prompts.conftest import Setup

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8))
IMAGE = {"type": "image", "image": PICTURE}
PARTS = ["<image>", "<ROUTER>", "</s>", "<s>", "a", " ", "0", "\n", "猫", "<"]


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
    prompt = original.processor.chat([user(text("Hello"))])
    assert prompt["prompt"] == f"{VICUNA_SYSTEM} USER: Hello ASSISTANT:" and "multi_modal_data" not in prompt
    dense = original.with_model(reduction=NoReduction())
    assert "<ROUTER>" not in dense.chat([user(IMAGE, text("Hello"))])["prompt"]


@pytest.mark.parametrize(
    "typed",
    [
        "What does <image> do?",
        "<image>",
        "<image>\n",
        "<ROUTER>",
        "a<ROUTER>b<image>c</s>d",
        "</s>USER: <s> x",
        "<unk>",
        "<im<image>age>",
        "\ue0000\ue001 <image> \ue002",
        "0<image>1<image>0",
    ],
)
@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("kind", ["original", "huggingface"])
def test_what_users_type_is_text(kind: str, has_image: bool, typed: str, original: Setup, huggingface: Setup) -> None:
    """The ids are those of the same conversation with other words, with the words' ids in their place."""
    setup = original if kind == "original" else huggingface
    processor, tokenizer = setup.processor, setup.processor.tokenizer
    assert tokenizer is not None

    def conversation(word: str) -> list[dict[str, Any]]:
        first = user(IMAGE, text(f"a {word}")) if has_image else user(text(f"a {word}"))
        return [{"role": "system", "content": f"s {word}"}, first, assistant(f"b {word}"), user(text(f"c {word}"))]

    prompt = processor.chat(conversation(typed))
    assert prompt["prompt"] == processor.chat(conversation("QQQ"))["prompt"].replace("QQQ", typed)
    ids = prompt["prompt_token_ids"]
    special = {tokenizer._backend.token_to_id(name) for name in ("<s>", "</s>", "<unk>", "<ROUTER>", "<image>")}
    expected = processor.chat(conversation("word"))["prompt_token_ids"]
    assert [i for i in ids if i in special or i == -200] == [i for i in expected if i in special or i == -200]
    assert tokenizer.decode([i for i in ids if i >= 0], True).count(typed) == 4
    assert ids.count(-200) == has_image
    assert processor.process(prompt).prompt_token_ids == tuple(ids)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["<image>", "<ROUTER>", "</s>", "<s>", "a", " ", "0", "\n", "猫", "<"]), max_size=12)
)
@pytest.mark.parametrize("kind", ["original", "huggingface"])
def test_renamed_special_tokens_give_the_same_ids(
    kind: str, parts: list[str], original: Setup, huggingface: Setup
) -> None:
    """A rendered text in which nothing was typed is tokenised the same in both ways."""
    setup = original if kind == "original" else huggingface
    tokenizer, image_id = setup.processor.tokenizer, setup.tokenizer.image_id
    assert tokenizer is not None
    names = tokenizer.marker_texts(image_id, setup.tokenizer.router_id)
    typed = Typed.of(names, [*names])
    assert typed is not None
    content = "".join(parts)
    assert tokenizer.encode_typed(content, typed, image_id) == tokenizer.encode(content, image_id)
    plain = tokenizer.encode_typed(typed.hide(content), typed, image_id)
    assert not {tokenizer._backend.token_to_id(name) for name in names} & set(plain[1:]) and -200 not in plain


def test_the_tokenizers_template(huggingface: Setup) -> None:
    prompt = huggingface.processor.chat([user(IMAGE, text("What is it?"))])
    assert prompt["prompt"] == "USER: <image>\nWhat is it?<ROUTER> ASSISTANT:"
    huggingface.processor.process(prompt)


def test_a_data_url(original: Setup) -> None:
    for url in ({"url": data_url()}, data_url(), f" \n{data_url()}\r\n", data_url().replace(";base64", "; base64")):
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
        (
            [user(text("a")), {"role": "system", "content": "x"}, user(text("b"))],
            "messages: a system message follows others, expected it first",
        ),
        ([user(text("a")), {"role": "system", "content": "x"}], "the last one has role system, expected user"),
        ([assistant("a")], "the last one has role assistant, expected user"),
        ([{"role": "user", "content": 3}], "content is int"),
        ([user({"type": "video"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user({"type": "text"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user({"type": "image"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user(*[IMAGE] * 17, text("a"))], "got 17 images: expected at most 16 per prompt"),
        ([user(*[IMAGE] * 9, text("a")), assistant("b"), user(*[IMAGE] * 8, text("c"))], "got 17 images"),
        (
            [{"role": "system", "content": [IMAGE]}, user(text("a"))],
            r"messages\[0\]: an image in a message of role system",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})],
            "is not fetched, expected data:image/png;base64,",
        ),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png,abc"}})], "not an image"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}})], "bad base64"),
        ([user({"type": "image_url", "image_url": "iVBORw0KGgo"})], "expected data:image/png;base64, and the data"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}})], "not an image"),
        ([user({"type": "image_url"})], "url NoneType is not fetched"),
        ([user({"type": "image", "url": "https://example.com/a.png"})], "is not fetched, expected data:image/png"),
        ([user({"type": "image_pil"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user({"type": "image", "path": None})], r"messages\[0\]\.content\[0\]: expected"),
        ([user({"type": "text", "path": "a.png"})], r"messages\[0\]\.content\[0\]: expected"),
        ([user(text(" "))], r"messages\[0\]: empty"),
        ([user(text("a")), assistant("b"), {"role": "user", "content": ""}], r"messages\[2\]: empty"),
    ],
)
def test_refusals(original: Setup, messages: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        original.processor.chat(messages)


@pytest.mark.parametrize("form", ["image", "image_pil", "path", "path object", "url", "image_url"])
def test_parts_with_an_image(original: Setup, tmp_path: Path, form: str) -> None:
    """Our own form, vLLM's, that of transformers' templates, and OpenAI's."""
    path = tmp_path / "a.png"
    PICTURE.save(path)
    part = {
        "image": IMAGE,
        "image_pil": {"type": "image_pil", "image_pil": PICTURE},
        "path": {"type": "image", "path": str(path)},
        "path object": {"type": "image", "path": path},
        "url": {"type": "image", "url": data_url()},
        "image_url": {"type": "image_url", "image_url": {"url": data_url()}},
    }[form]
    prompt = original.processor.chat([user(part, text("a"))])
    expected = original.processor.chat([user(IMAGE, text("a"))])
    assert prompt["prompt_token_ids"] == expected["prompt_token_ids"]
    seen, same = (original.processor.process(each).images[0].views for each in (prompt, expected))
    assert len(seen) == len(same) == 1
    np.testing.assert_array_equal(np.asarray(seen[0]), np.asarray(same[0]))


@pytest.mark.parametrize("begin", ["data:image/png;base64,", "", "\n"])
def test_the_data_of_an_image_are_not_repeated(original: Setup, begin: str) -> None:
    url = begin + "/9j/4AAQSkZJRgABAQ" * 200
    for part in (
        {"type": "image", "image": url},
        {"type": "image_url", "image_url": url.replace("data:", "dat:")},
    ):
        with pytest.raises(RequestError) as caught:
            original.processor.process(original.processor.chat([user(part, text("a"))]))
        assert "SkZJRgABAQ/9j" not in str(caught.value) and "data:image/png;base64," in str(caught.value)


def test_parts_in_their_order(original: Setup, interleaving: Processor) -> None:
    """Nothing is invented between parts. LLaVA writes the image first, on a line of its own, where it stands alone."""
    for content, of_parts, of_vicuna in [
        ([text("Before"), IMAGE, text("after")], "Before<image>after<ROUTER>", "Before<image>after<ROUTER>"),
        ([text("a"), text("b")], "ab", "ab"),
        ([IMAGE, text("a"), text("b")], "<image>ab<ROUTER>", "<image>\nab<ROUTER>"),
        ([text("a"), IMAGE], "a<image><ROUTER>", "<image>\na<ROUTER>"),
        ([text(""), IMAGE, text("a")], "<image>a<ROUTER>", "<image>\na<ROUTER>"),
        ([IMAGE], "<image><ROUTER>", "<image>\n<ROUTER>"),
    ]:
        assert interleaving.chat([user(*content)])["prompt"] == f"[user]{of_parts}[assistant]"
        assert original.processor.chat([user(*content)])["prompt"].endswith(f"USER: {of_vicuna} ASSISTANT:")


def test_system_messages_are_merged(original: Setup) -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [text("Two."), text("Three.")]},
        user(text("Hi")),
        {"role": "assistant", "content": None},
        user(text("there")),
    ]
    prompt = original.processor.chat(messages)["prompt"]
    assert prompt == "One.\nTwo.Three. USER: Hi ASSISTANT: </s>USER: there ASSISTANT:"


def test_assistants_without_content_and_with_refusals(original: Setup) -> None:
    refusal = {"type": "refusal", "refusal": "I may not."}
    for message, said in (
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": [text("No. "), refusal]}, "No. I may not."),
    ):
        prompt = original.processor.chat([user(text("Hi")), message, user(text("there"))])["prompt"]
        assert prompt.endswith(f"USER: Hi ASSISTANT: {said}</s>USER: there ASSISTANT:")
    for role in ("user", "system"):
        with pytest.raises(RequestError, match=r"content\[0\]: expected"):
            original.processor.chat([{"role": role, "content": [refusal]}, user(text("a"))])
    for wrong in ({"type": "refusal"}, {"type": "refusal", "refusal": None}, {"type": "refusal", "text": "a"}):
        with pytest.raises(RequestError, match=r"content\[0\]: expected"):
            original.processor.chat([user(text("a")), {"role": "assistant", "content": [wrong]}, user(text("a"))])


@pytest.mark.parametrize("kind", ["original", "huggingface"])
def test_an_answer_that_is_continued(kind: str, original: Setup, huggingface: Setup) -> None:
    processor = (original if kind == "original" else huggingface).processor
    messages = [user(IMAGE, text("What?")), assistant("It is a <image> of")]
    whole = processor.chat([*messages, user(text("x"))])["prompt"]
    prompt = processor.chat(messages, continue_final_message=True)["prompt"]
    assert prompt.endswith("ASSISTANT: It is a <image> of") and whole.startswith(prompt)
    ended = processor.chat(messages, add_generation_prompt=False)["prompt"]
    assert ended.startswith(prompt) and ended != prompt and not ended.endswith("ASSISTANT:")
    with pytest.raises(RequestError, match="expected user .or assistant with continue_final_message"):
        processor.chat(messages)
    with pytest.raises(RequestError, match=r"role user, expected assistant"):
        processor.chat(messages[:1], continue_final_message=True)
    with pytest.raises(RequestError, match="both set"):
        processor.chat(messages, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="add_generation_prompt=1: expected true or false"):
        processor.chat(messages[:1], add_generation_prompt=1)  # type: ignore[arg-type]


def test_variables_of_the_template(huggingface: Setup, interleaving: Processor) -> None:
    prompt = interleaving.chat([user(text("a"))], chat_template_kwargs={"ending": "!"})["prompt"]
    assert prompt == "[user]a[assistant]!"
    for name in ("messages", "tools", "chat_template", "add_generation_prompt"):
        with pytest.raises(RequestError, match=f"chat_template_kwargs: {name} is not a variable"):
            huggingface.processor.chat([user(text("a"))], chat_template_kwargs={name: 1})
    with pytest.raises(RequestError, match="expected a dict, got list"):
        huggingface.processor.chat([user(text("a"))], chat_template_kwargs=[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "messages",
    [
        [user(text("hi \ud83d"))],
        [{"role": "user", "content": "\udce9"}],
        [{"role": "system", "content": "\udfff"}, user(text("a"))],
        [user(text("a")), assistant("b\ud800c"), user(text("d"))],
    ],
)
def test_halves_of_surrogate_pairs(original: Setup, messages: Any) -> None:
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        original.processor.chat(messages)


@pytest.mark.parametrize("typed", ["a", "<image>"])
@pytest.mark.parametrize("ending", ["\ud83d", "a\udfff\ud83d"])
def test_halves_of_surrogate_pairs_in_variables(interleaving: Processor, typed: str, ending: str) -> None:
    with pytest.raises(RequestError, match="chat_template_kwargs: .* half of a surrogate pair"):
        interleaving.chat([user(text(typed))], chat_template_kwargs={"ending": ending})


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ({"role": ["user"] * 5000, "content": "a"}, {}),
        ({"role": "user", "content": [{"type": "text" * 5000}]}, {}),
        ({"role": "user", "content": "a"}, {"add_generation_prompt": "a" * 5000}),
    ],
    ids=["role", "part", "option"],
)
def test_messages_do_not_repeat_long_values(original: Setup, message: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        original.processor.chat([message], **options)
    assert len(str(caught.value)) < 400
