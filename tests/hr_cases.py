"""The reference data of tests/golden_hr as checkpoints, prompts and expectations (see golden_hr/README.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from tests.golden_cases import GoldenCase

DIRECTORY = Path(__file__).parent / "golden_hr"
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HrCase(GoldenCase):
    """One file: a whole LLaVA-HR model, an image, a prompt, and what the published code computed from them."""

    @property
    def directory(self) -> Path:
        return DIRECTORY

    @property
    def published_config(self) -> dict[str, Any]:
        """The content of config.json."""
        config: dict[str, Any] = json.loads(json.dumps(self.meta["config"]))
        return config

    def write_checkpoint(self, directory: Path, *, file_format: str = "safetensors") -> Path:
        return write_checkpoint(directory, self.published_config, self.original_weights(), file_format=file_format)

    @property
    def is_dpn(self) -> bool:
        return "pooling" in self.published_config

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.arrays["image"], "RGB")

    @property
    def has_image(self) -> bool:
        return IMAGE_PLACEHOLDER_ID in self.prompt_token_ids

    def request(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt_token_ids, "multi_modal_data": {"image": self.image}}

    @property
    def pool_at(self) -> list[int]:
        """Layers of the boundaries."""
        return list(self.meta["pool_at"]) if self.is_dpn else []

    @property
    def pooled(self) -> list[bool]:
        ran = self.arrays["pool_layer_idx"].tolist() if self.is_dpn else []
        return [layer in ran for layer in self.pool_at]

    @property
    def experts(self) -> list[int | None]:
        taken = iter(self.arrays["pool_expert"].tolist() if self.is_dpn else [])
        return [next(taken) if pooled else None for pooled in self.pooled]

    @property
    def probs(self) -> list[list[float] | None]:
        """Without the zeros that pad the rows of boundaries with few experts."""
        rows = iter(self.arrays["pool_probs"].tolist() if self.is_dpn else [])
        layers = self.published_config["pooling"]["pooling_layers"] if self.is_dpn else []
        counts = [len(layer["kernel_size"]) for layer in layers]
        return [next(rows)[:count] if pooled else None for pooled, count in zip(self.pooled, counts, strict=True)]

    @property
    def first_layers(self) -> list[int]:
        return [0, *(layer + 1 for layer in self.pool_at)]

    @property
    def visual_tokens(self) -> list[int]:
        after = self.arrays["layer_num_vision"].tolist() if self.is_dpn else []
        return [len(self.arrays["image_features"]), *(after[layer] for layer in self.pool_at)]


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], weights: Weights, *, file_format: str = "safetensors"
) -> Path:
    """A checkpoint directory with these files alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))
    if file_format == "safetensors":
        save_file(weights, directory / "model.safetensors")
    else:
        torch.save(weights, directory / "pytorch_model.bin")
    return directory


HR_CASES = tuple(HrCase(path.stem) for path in sorted(DIRECTORY.glob("*.npz")))


def hr_case(name: str) -> HrCase:
    """The first case whose name begins so."""
    return next(case for case in HR_CASES if case.name.startswith(name))


def assert_near(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape, what
    error = (actual.double() - expected.double()).abs()
    assert torch.isfinite(error).all(), what
    assert error.max() <= tolerance, f"{what}: {error.max():.2e} at {tuple(torch.nonzero(error == error.max())[0])}"
