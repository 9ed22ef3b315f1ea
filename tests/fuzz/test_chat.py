"""Conversations and chat templates: each becomes a prompt, or an error of our own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from dpn_rt.errors import DpnError, RequestError
from dpn_rt.prompts.processor import Processor
from dpn_rt.prompts.template import JinjaTemplate
from tests.fuzz.harness import Surface, assert_own_words, fuzz
from tests.fuzz.json_mutations import encode, mutate_json
from tests.prompts.conftest import INTERLEAVING_TEMPLATE, LLAVA_TEMPLATE, make_setup
from tests.server.conftest import Ask, data_url, png

URL = data_url(png(Ask().image.resize((4, 4))))
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
WORDS = {"type": "text", "text": "What is this?"}
ASKED = {"role": "user", "content": [IMAGE, WORDS]}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [ASKED]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <image> </s>"}]},
    {"messages": [ASKED, {"role": "assistant", "content": "A fox."}, {"role": "user", "content": "Why?"}]},
    {"messages": [ASKED, {"role": "assistant", "content": "A"}], "continue_final_message": True},
    {"messages": [ASKED], "chat_template_kwargs": {"ending": "so", "bos_token": "<s>"}, "add_generation_prompt": True},
]
BLOCKS = [
    "{{ 1 / 0 }}", "{{ messages[99] }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ range(10) }}",
    "{{ self }}", "{% if %}", "{{ messages | tojson }}", "{{ messages[0].content.x.y }}", "{{ cycler }}",
    "{{ '\\ud800' }}",
    "{% generation %}a{% endgeneration %}", "{{ strftime_now('%Y') }}", "{% break %}", "{{ messages | attr('pop') }}",
    "{% set ns = namespace(x=1) %}{{ ns }}", "{{ messages[0] }}", "{{ lipsum.__globals__ }}", "{{ bos_token * 3 }}",
]  # fmt: skip


def test_every_conversation_is_a_prompt_or_an_error(tmp_path: Path) -> None:
    processors = {
        "original": make_setup(tmp_path / "original", huggingface=False).processor,
        "huggingface": make_setup(tmp_path / "huggingface", huggingface=True).processor,
        "interleaving": make_setup(tmp_path / "interleaving", True, INTERLEAVING_TEMPLATE).processor,
    }
    seeds = [encode({"processor": name, **chat}) for name in processors for chat in CONVERSATIONS]
    fuzz(Surface("chat", seeds, mutate_json, lambda data: check_conversation(data, processors)))


def check_conversation(data: bytes, processors: dict[str, Processor]) -> None:
    chat = parsed(data)
    if not isinstance(chat, dict) or set(chat) - {"processor"} > set(CONVERSATIONS[-1]):
        return
    processor = processors.get(str(chat.get("processor")), processors["original"])
    options = {name: chat[name] for name in set(CONVERSATIONS[-1]) - {"messages"} if name in chat}
    try:
        processed = processor.process(processor.chat(chat.get("messages"), **options))  # type: ignore[arg-type]
    except RequestError as error:
        assert_own_words(str(error), 1000)
    else:
        assert processed.num_rows < processor.max_model_len and len(processed.images) == len(processed.image_starts)
        assert np.all((processed.token_ids >= 0) | (processed.token_ids == -200))


def test_every_template_is_taken_or_refused() -> None:
    fuzz(
        Surface(
            "templates", [t.encode() for t in (LLAVA_TEMPLATE, INTERLEAVING_TEMPLATE)], mutate_template, check_template
        )
    )


def check_template(data: bytes) -> None:
    try:
        JinjaTemplate(data.decode("utf-8", "surrogateescape"), {"bos_token": "<s>"}, "<image>")
    except DpnError as error:
        assert_own_words(str(error), 1000)


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    """Pieces between the marks of Jinja are left out, doubled and exchanged, and others are put in."""
    pieces = [piece for piece in data.replace(b"{", b"\0{").split(b"\0") if piece]
    if not pieces or len(pieces) > 200:
        return LLAVA_TEMPLATE.encode()
    place = rng.randrange(len(pieces))
    kind = rng.choice(("delete", "double", "swap", "insert", "insert", "cut"))
    if kind == "delete":
        del pieces[place]
    elif kind == "double":
        pieces.insert(place, pieces[place])
    elif kind == "swap":
        other = rng.randrange(len(pieces))
        pieces[place], pieces[other] = pieces[other], pieces[place]
    elif kind == "insert":
        pieces.insert(place, rng.choice(BLOCKS).encode())
    else:
        start = rng.randrange(len(pieces[place]) + 1)
        pieces[place] = pieces[place][:start] + pieces[place][start + rng.randrange(4) :]
    return b"".join(pieces)


def parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
