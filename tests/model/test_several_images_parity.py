"""Several images and turns in one prompt give the log-probabilities of transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.outputs import RequestOutput
from tests.model.llava_checkpoints import IMAGES, save_checkpoint

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=-1, ignore_eos=True)
ROWS = 16
"""Visual tokens of one image."""


@pytest.fixture(scope="module", params=["clip", "siglip"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    family = "qwen2" if request.param == "siglip" else "mistral"
    text = {"sliding_window": None} if family == "mistral" else {}
    model = save_checkpoint(
        path / "checkpoint", tied=False, kv_heads=2, old_names=False, family=family, tower=request.param, **text
    )
    build_engine(path / "checkpoint", path / "engine", dtype="float32")
    return path / "engine", model


def pictures() -> list[Image.Image]:
    """Photographs of other sizes and aspects, and one again with one pixel changed."""
    cat, rocket = (Image.open(IMAGES / name).convert("RGB") for name in ("cat.jpg", "rocket.jpg"))
    changed = cat.copy()
    changed.putpixel((cat.width // 2, cat.height // 2), (0, 255, 0))
    return [cat, rocket.resize((70, 190)), changed]


def assert_as_transformers(
    llm: LLM, model: LlavaForConditionalGeneration, prompt: dict[str, Any], output: RequestOutput
) -> None:
    """Every log-probability, up to an image token: transformers' model would want another image there."""
    processed = llm.processor.process(prompt)
    pixels = torch.stack([image.views[0] for image in processed.images])
    answer, image_token = output.outputs[0], model.config.image_token_id
    tokens = [*answer.token_ids, image_token]
    tokens = tokens[: tokens.index(image_token)]
    ids: list[int] = []
    for token_id in [*output.prompt_token_ids, *tokens]:
        ids += [image_token] * ROWS if token_id == IMAGE_PLACEHOLDER_ID else [token_id]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits[0]
    expected = logits[-1 - len(tokens) :].log_softmax(-1)[: len(answer.token_ids)]
    assert answer.logprobs is not None
    logprobs = answer.logprobs[: len(expected)]
    actual = torch.tensor([[each[token].logprob for token in range(expected.shape[1])] for each in logprobs])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "order", [[0], [0, 1, 2], [2, 1, 0], [1, 1]], ids=lambda order: "-".join(str(number) for number in order)
)
def test_images_within_one_prompt(saved: tuple[Path, Any], order: list[int]) -> None:
    engine, model = saved
    llm, images = LLM(engine), pictures()
    text = "USER: " + "".join(f"<image> is {number}, " for number in order) + "what? ASSISTANT:"
    prompt = {"prompt": text, "multi_modal_data": {"image": [images[number] for number in order]}}
    assert_as_transformers(llm, model, prompt, llm.generate(prompt, GREEDY, use_tqdm=False)[0])


@pytest.mark.parametrize("reuse_bytes", [0, 2**24])
def test_second_turn_with_another_image(saved: tuple[Path, Any], reuse_bytes: int) -> None:
    engine, model = saved
    llm, (first, second, _) = LLM(engine, reuse_bytes=reuse_bytes, block_size=4), pictures()

    def user(image: Image.Image, text: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}

    messages = [user(first, "What is this?")]
    answer = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert_as_transformers(llm, model, llm.processor.chat(messages), answer)
    messages += [{"role": "assistant", "content": "A cat."}, user(second, "And this?")]
    for _ in range(2):
        answer = llm.chat(messages, GREEDY, use_tqdm=False)[0]
        assert_as_transformers(llm, model, llm.processor.chat(messages), answer)
    assert answer.pyramid.visual_tokens == [2 * ROWS]
