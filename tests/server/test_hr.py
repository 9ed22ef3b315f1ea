"""A LLaVA-HR checkpoint with a tokenizer and without an image processor's file: commands, chat and HTTP."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dpn_rt import LLM, SamplingParams
from dpn_rt import build as build_command
from dpn_rt import generate as generate_command
from tests.hr_cases import hr_case, write_checkpoint
from tests.server.conftest import OPTIONS, data_url, png, run_server
from tests.tiny_tokenizer import make_tokenizer

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command, from a DPN checkpoint whose vocabulary is the tokenizer's."""
    folder = tmp_path_factory.mktemp("hr")
    case = hr_case("e04")
    config, weights = case.published_config, case.original_weights()
    tokenizer = make_tokenizer(folder / "checkpoint")
    config |= {"vocab_size": tokenizer.vocab_size, "router_token_id": tokenizer.router_id}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(tokenizer.vocab_size, config["hidden_size"])
    write_checkpoint(folder / "checkpoint", config, weights)
    build_command.main(["--checkpoint", str(folder / "checkpoint"), "--output", str(folder / "engine")])
    return folder / "engine"


@pytest.fixture
def image() -> Image.Image:
    pixels = torch.randint(256, (50, 70, 3), dtype=torch.uint8).numpy()
    return Image.fromarray(pixels, "RGB")


def content(image: Image.Image, kind: str) -> list[dict[str, object]]:
    url = {"type": "image_url", "image_url": {"url": data_url(png(image))}}
    part = url if kind == "url" else {"type": "image", "image": image}
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_the_same_answer_everywhere(engine_path: Path, image: Image.Image, max_tokens: int, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    output = LLM(engine_path).chat(content(image, "image"), params, use_tqdm=False)[0]
    answer = output.outputs[0].text
    assert output.pyramid.visual_tokens[0] == 576

    image.save(tmp_path / "picture.png")
    printed = io.StringIO()
    arguments = ["--engine", str(engine_path), "--image", str(tmp_path / "picture.png"), "--prompt", QUESTION]
    with contextlib.redirect_stdout(printed):
        generate_command.main([*arguments, "--max-tokens", str(max_tokens), "--json"])
    assert json.loads(printed.getvalue())["text"] == answer

    server = run_server(engine_path, OPTIONS)
    try:
        body = {"model": "tiny", "messages": content(image, "url"), "temperature": 0, "max_tokens": max_tokens}
        replies = [server.post(body) for _ in range(2)]  # the second time from the caches
        assert [reply.status_code for reply in replies] == [200, 200]
        assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == [answer, answer]
        long = server.post({**body, "messages": content(Image.new("RGB", (10000, 10)), "url")})
        assert long.status_code == 400
        assert "image 0" in long.json()["error"]["message"] or "10000 x 10" in long.json()["error"]["message"]
    finally:
        server.stop()
