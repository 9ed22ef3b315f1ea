"""A checkpoint that transformers saved gives the logits of transformers' own model, image included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.reference import EagerDpn
from tests.model.llava_checkpoints import IMAGES, save_checkpoint

NUM_TOKENS = 5
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("old_names", [False, True], ids=["transformers5", "transformers4"])
@pytest.mark.parametrize(("tied", "kv_heads"), [(False, 4), (True, 2), (False, 1)])
def test_logits_of_transformers(tmp_path: Path, tied: bool, kv_heads: int, old_names: bool) -> None:
    model = save_checkpoint(tmp_path / "checkpoint", tied=tied, kv_heads=kv_heads, old_names=old_names)
    check_logits(tmp_path, model)


@pytest.mark.parametrize("old_names", [False, True], ids=["transformers5", "transformers4"])
@pytest.mark.parametrize(
    ("family", "tied", "kv_heads", "text"),
    [
        ("mistral", False, 2, {"sliding_window": None}),
        ("mistral", False, 4, {"sliding_window": 128, "head_dim": 32, "rope_theta": 1e6}),
        ("mistral", False, 2, {"sliding_window": 9}),
        ("qwen2", True, 2, {"rope_theta": 1e6}),
        ("qwen2", False, 4, {}),
        ("qwen2", False, 2, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("qwen3", False, 2, {"head_dim": 32}),
        ("qwen3", True, 4, {"head_dim": 8, "attention_bias": True, "rope_theta": 1e6}),
        ("qwen3", False, 1, {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("llama", False, 2, {"rope_scaling": LLAMA3_ROPE}),
        ("qwen3", False, 2, {"head_dim": 32, "rope_scaling": LLAMA3_ROPE}),
        ("llama", False, 2, {"rope_scaling": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", False, 2, {"rope_scaling": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
        ("qwen2", False, 2, {"rope_scaling": YARN_ROPE}),
    ],
)
def test_families_of_decoders(
    tmp_path: Path, family: str, tied: bool, kv_heads: int, text: dict[str, Any], old_names: bool
) -> None:
    model = save_checkpoint(
        tmp_path / "checkpoint", tied=tied, kv_heads=kv_heads, old_names=old_names, family=family, **text
    )
    check_logits(tmp_path, model)


@pytest.mark.parametrize("old_names", [False, True], ids=["transformers5", "transformers4"])
def test_siglip_and_qwen2(tmp_path: Path, old_names: bool) -> None:
    model = save_checkpoint(
        tmp_path / "checkpoint", tied=True, kv_heads=2, old_names=old_names, family="qwen2", tower="siglip"
    )
    check_logits(tmp_path, model)


def check_logits(tmp_path: Path, model: LlavaForConditionalGeneration) -> None:
    """The engine of tmp_path/checkpoint, where `model` is saved, answers as `model` and as the eager reference."""
    build_engine(tmp_path / "checkpoint", tmp_path / "engine", dtype="float32")
    llm = LLM(tmp_path / "engine")
    image = Image.open(IMAGES / "cat.jpg")
    prompt = {"prompt": PROMPT, "multi_modal_data": {"image": image}}
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=-1, ignore_eos=True)
    output = llm.generate(prompt, params, use_tqdm=False)[0]

    processed = llm.processor.process(prompt)
    visual = EagerDpn.from_engine(tmp_path / "engine").encode_image(processed.images[0].views[0])
    with torch.inference_mode():
        features = model.model.get_image_features(pixel_values=processed.images[0].views[0][None])
    expected = getattr(features, "pooler_output", features)[0]
    torch.testing.assert_close(visual, expected, atol=1e-5, rtol=1e-5)

    ids: list[int] = []
    for token_id in output.prompt_token_ids:
        ids += [model.config.image_token_id] * 16 if token_id == -200 else [token_id]
    for position, token_id in enumerate(output.outputs[0].token_ids):
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([ids]), pixel_values=processed.images[0].views[0][None], use_cache=False
            ).logits[0, -1]
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        actual = torch.tensor([logprobs[position][token].logprob for token in range(len(logits))])
        torch.testing.assert_close(actual, logits.log_softmax(-1), atol=1e-4, rtol=0)
        if token_id == model.config.image_token_id:  # transformers' model would want another image
            break
        ids.append(token_id)


def test_preprocessing_is_that_of_transformers(tmp_path: Path) -> None:
    """The layout's own `preprocessor_config.json` is used; images are not padded."""
    from transformers import CLIPImageProcessor

    save_checkpoint(tmp_path / "checkpoint", tied=False, kv_heads=4, old_names=False)
    build_engine(tmp_path / "checkpoint", tmp_path / "engine", dtype="float32")
    llm = LLM(tmp_path / "engine")
    image = Image.open(IMAGES / "rocket.jpg")
    visual = llm.processor.process({"prompt": PROMPT, "multi_modal_data": {"image": image}}).images[0]
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Reference
    except ImportError:
        Reference = CLIPImageProcessor
    reference = Reference.from_pretrained(tmp_path / "checkpoint")(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(visual.views[0], torch.as_tensor(reference))
