"""Images in tiles give the log-probabilities of transformers' own LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.outputs import RequestOutput
from tests.model.llava_checkpoints import IMAGES, decoder_config, tower_config
from tests.tiny_tokenizer import make_tokenizer

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=-1, ignore_eos=True)
SIDE = 56
KINDS = {  # family of decoders, tower, KV heads, tied embeddings
    "next-vicuna": ("llama", "clip", 4, False),
    "next-mistral": ("mistral", "clip", 2, False),
    "next-mistral-window": ("mistral", "clip", 2, False),
    "onevision": ("qwen2", "siglip", 2, True),
    "onevision-7b": ("qwen2", "siglip", 4, False),
}
RESOLUTIONS = {
    "next": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]],
    "onevision": [[SIDE * rows, SIDE * columns] for rows in range(1, 5) for columns in range(1, 5)],
}
SIZES = [(56, 56), (300, 200), (200, 300), (120, 41), (41, 120), (500, 90), (90, 500), (57, 55), (112, 112), (231, 230)]
"""Width and height of pictures."""


def save_anyres(path: Path, kind: str) -> Any:
    """A random model with tokenizer and image processor in `path`, and the model itself."""
    family, tower, kv_heads, tied = KINDS[kind]
    onevision = kind.startswith("onevision")
    tokenizer = make_tokenizer(path, router=False, image=True)
    shared: dict[str, Any] = {
        "vision_config": tower_config(tower),
        "text_config": decoder_config(
            family,
            vocab_size=tokenizer.vocab_size + 7,
            num_key_value_heads=kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
            **({"sliding_window": 21 if "window" in kind else None} if family == "mistral" else {}),
        ),
        "image_token_index": tokenizer.image_id,
        "tie_word_embeddings": tied,
        "image_grid_pinpoints": RESOLUTIONS["onevision" if onevision else "next"],
    }
    if onevision:
        config = LlavaOnevisionConfig(**shared, video_token_index=1, vision_aspect_ratio="anyres_max_4")
        model: Any = LlavaOnevisionForConditionalGeneration(config)
        processor: Any = LlavaOnevisionImageProcessorPil
        size = {"height": SIDE, "width": SIDE}
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared))
        processor, size = LlavaNextImageProcessorPil, {"shortest_edge": SIDE}
        settings = {"crop_size": {"height": SIDE, "width": SIDE}}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
        if tied:
            model.tie_weights()
    model.eval().save_pretrained(path)
    processor(size=size, image_grid_pinpoints=shared["image_grid_pinpoints"], **settings).save_pretrained(path)
    return model


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    model = save_anyres(path / "checkpoint", request.param)
    build_engine(path / "checkpoint", path / "engine", dtype="float32")
    return path / "engine", model


def photograph(size: tuple[int, int], name: str = "cat.jpg") -> Image.Image:
    return Image.open(IMAGES / name).convert("RGB").resize(size)


def rows_of_transformers(engine: Path, model: Any, images: list[Image.Image]) -> list[torch.Tensor]:
    """What transformers' processor and model make of the images of one prompt."""
    onevision = isinstance(model, LlavaOnevisionForConditionalGeneration)
    kind: Any = LlavaOnevisionImageProcessorPil if onevision else LlavaNextImageProcessorPil
    processor = kind.from_pretrained(engine / "processor")
    inputs = processor([images] if onevision else images, return_tensors="pt")
    with torch.inference_mode():
        return list(model.get_image_features(**inputs).pooler_output)


def assert_as_transformers(engine: Path, model: Any, images: list[Image.Image], output: RequestOutput) -> None:
    """Every log-probability, up to an image token: transformers' model would want another image there."""
    rows = rows_of_transformers(engine, model, images)
    answer, image_token = output.outputs[0], model.config.image_token_id
    tokens = [*answer.token_ids, image_token]
    tokens = tokens[: tokens.index(image_token)]
    table, embeds, image = model.get_input_embeddings(), [], iter(rows)
    with torch.inference_mode():
        for token_id in [*output.prompt_token_ids, *tokens]:
            embeds.append(next(image) if token_id == IMAGE_PLACEHOLDER_ID else table(torch.tensor([token_id])))
        logits = model(inputs_embeds=torch.cat(embeds)[None], use_cache=False).logits[0]
    expected = logits[-1 - len(tokens) :].log_softmax(-1)[: len(answer.token_ids)]
    assert answer.logprobs is not None
    actual = torch.tensor(
        [[each[token].logprob for token in range(expected.shape[1])] for each in answer.logprobs[: len(expected)]]
    )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert expected[: len(tokens)].argmax(-1).tolist() == tokens


def asked(images: list[Image.Image]) -> dict[str, Any]:
    text = "USER: " + "".join(f"<image> is {number}, " for number in range(len(images))) + "what? ASSISTANT:"
    return {"prompt": text, "multi_modal_data": {"image": images}}


def test_photographs_of_ten_sizes(saved: tuple[Path, Any]) -> None:
    engine, model = saved
    llm = LLM(engine)
    prompts = [asked([photograph(size)]) for size in SIZES]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_as_transformers(engine, model, prompt["multi_modal_data"]["image"], output)


def test_three_images_and_two_turns(saved: tuple[Path, Any]) -> None:
    engine, model = saved
    images = [photograph((300, 200)), photograph((90, 230), "rocket.jpg"), photograph((300, 200), "rocket.jpg")]
    for reuse_bytes in (0, 2**24):
        llm = LLM(engine, reuse_bytes=reuse_bytes, block_size=4)
        prompt = asked(images)
        for _ in range(2):
            assert_as_transformers(engine, model, images, llm.generate(prompt, GREEDY, use_tqdm=False)[0])
        user = {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What?"}]}
        turn: list[Any] = [user, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
        for messages in (turn[:1], turn):
            assert_as_transformers(engine, model, images[:1], llm.chat(messages, GREEDY, use_tqdm=False)[0])
