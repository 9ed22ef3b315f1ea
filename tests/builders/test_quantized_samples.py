"""Quantised checkpoints of transformers and compressed-tensors: logits, and what an engine stores."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.vision.encoder import load_encoder
from dpn_rt.model.weights.tiles import unpack_int8
from dpn_rt.reference import EagerDpn
from dpn_rt.schema.dtypes import Quantize
from tests.builders.quantized_checkpoints import SAMPLES

IMAGE = 95
"""Id of each of the image's rows in the samples' prompts."""


class Sample:
    """A prompt, its image and transformers' logits."""

    def __init__(self, name: str) -> None:
        tensors = load_file(SAMPLES / name / "expected.safetensors")
        ids = tensors["input_ids"][0].tolist()
        self.before, self.after = ids[: ids.index(IMAGE)], ids[ids.index(IMAGE) + ids.count(IMAGE) :]
        self.pixels = tensors["pixel_values"].float()
        logits = tensors["logits_fp32"][0]
        self.logits = torch.cat((logits[: len(self.before)], logits[-len(self.after) - 1 :]))
        """Of each token before the image, the last row of the image, and each token after it."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative difference of logits, each row up to a constant that no probability depends on."""
    rows = [each.double() - each.double().mean(1, keepdim=True) for each in (actual, expected)]
    return float((rows[0] - rows[1]).norm() / rows[1].norm())


def engine_logits(path: Path, sample: Sample) -> Tensor:
    """Of every position of `Sample.logits`: each is the end of a prompt of its own."""
    engine = EngineDir.open(path)
    encoder = load_encoder(engine.model.vision, engine.model.projector, engine.load_weights(), prepack=False)
    assert encoder is not None
    media = {"image_embeds": encoder.forward([sample.pixels])[0], "image_grid": (2, 2)}
    prompts: list[dict[str, object]] = [
        {"prompt_token_ids": sample.before[:count]} for count in range(1, len(sample.before) + 1)
    ]
    for count in range(len(sample.after) + 1):
        ids = [*sample.before, -200, *sample.after[:count]]
        prompts.append({"prompt_token_ids": ids, "multi_modal_data": media})
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, ignore_eos=True)
    outputs = LLM(path).generate(prompts, params, use_tqdm=False)
    tokens = range(sample.logits.shape[1])
    return torch.tensor([[output.outputs[0].logprobs[0][token].logprob for token in tokens] for output in outputs])


def test_logits_of_the_engine_that_w8a8_becomes(tmp_path: Path) -> None:
    """Its rows are rounded as the package does; it rounds tower, projector and output layer too."""
    sample = Sample("w8a8")
    build_engine(SAMPLES / "w8a8", tmp_path / "engine", dtype="float32")
    logits, text = engine_logits(tmp_path / "engine", sample), len(sample.before)
    assert relative(logits, sample.logits) < 0.03
    assert relative(logits[:text], sample.logits[:text]) < 0.015


@pytest.mark.parametrize(("name", "most"), [("w4a16_g64", 0.005), ("w8a16", 0.005), ("w8a8", 0.03)])
def test_logits_with_the_published_weights(tmp_path: Path, name: str, most: float) -> None:
    """Rows before the image are the same; the others see pixels that the sample has rounded (see its README)."""
    sample = Sample(name)
    build_engine(SAMPLES / name, tmp_path / "engine", dtype="float32", quantize="none")
    logits = engine_logits(tmp_path / "engine", sample)
    assert relative(logits, sample.logits) < most
    if name != "w8a8":
        text = len(sample.before)
        assert relative(logits[:text], sample.logits[:text]) < 1e-5


def test_logits_with_rows_rounded_as_the_package_does() -> None:
    """W8A8 is the same before the image, so weights, scales and the choice of layers are those of the package."""
    sample = Sample("w8a8")
    model = EagerDpn.from_checkpoint(SAMPLES / "w8a8", dtype=torch.float32)
    for module in model.language_model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (round_rows(inputs[0]),))
    with torch.no_grad():
        embeds = model.encode_image(sample.pixels)
        ids = [*sample.before, -200, *sample.after]
        actual = model.forward(ids, image_embeds=embeds).logits
    rows = [*range(len(sample.before)), *range(-len(sample.after) - 1, 0)]
    logits, text = actual[rows], len(sample.before)
    assert relative(logits[:text], sample.logits[:text]) < 1e-5
    assert relative(logits, sample.logits) < 0.03


def round_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_w8a8_is_taken_over(tmp_path: Path, quantize: Quantize | None) -> None:
    notes: list[str] = []
    engine = build_engine(SAMPLES / "w8a8", tmp_path / "engine", quantize=quantize, note=notes.append)
    assert engine.model.quantize == "int8" and engine.model.dtype == "bfloat16"
    assert not [note for note in notes if "rounded again" in note]
    stored, published = engine.load_weights(), load_file(SAMPLES / "w8a8" / "model.safetensors")
    for layer in range(2):
        prefix = f"language_model.model.layers.{layer}."
        for module, parts in (("qkv", ["self_attn.q", "self_attn.k", "self_attn.v"]), ("down", ["mlp.down"])):
            scale = torch.cat([published[f"{prefix}{part}_proj.weight_scale"][:, 0] for part in parts])
            q = torch.cat([published[f"{prefix}{part}_proj.weight"] for part in parts])
            assert torch.equal(stored[f"layers.{layer}.{module}.scale"], scale.float())
            assert torch.equal(unpack_int8(stored[f"layers.{layer}.{module}.int8"]), q)


def test_building_twice_gives_the_same_engine(tmp_path: Path) -> None:
    engines = [build_engine(SAMPLES / "w4a16_g64", tmp_path / str(number), quantize="int4") for number in (0, 1)]
    first, second = (copy.copy(engine.files) for engine in engines)
    assert first == second
