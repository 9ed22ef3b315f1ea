"""The reference data of tests/golden_reducers as engines, prompts and expectations (see golden_reducers/README.md)."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dpn_rt.format.config import ModelConfig, PromptConfig
from dpn_rt.model.reduction.reduction import NoReduction
from tests.golden_cases import GoldenCase

DIRECTORY = Path(__file__).parent / "golden_reducers"


@dataclasses.dataclass(frozen=True)
class ReducerCase(GoldenCase):
    """One file: a stock model, a prompt, a reduction, and what the published code computed from them."""

    @property
    def directory(self) -> Path:
        return DIRECTORY

    @cached_property
    def config(self) -> ModelConfig:  # type: ignore[override]
        return ModelConfig(
            dtype="float32",
            decoder=self.decoder,
            reduction=NoReduction(),
            prompt=PromptConfig(
                template="vicuna_v1",
                image_aspect_ratio="pad",
                bos_token_id=1,
                eos_token_ids=(2,),
                image_token_id=None,
                router_token_id=None,
                has_tokenizer=False,
                has_image_processor=False,
            ),
            vision=None,
            projector=None,
        )

    @property
    def spec(self) -> str:
        """The reduction as a SPEC."""
        method = self.meta["method"]
        match method["name"]:
            case "fastv":
                return f"fastv:k={method['k']},ratio={method['r']}"
            case "pdrop":
                layers = "-".join(map(str, method["layer_list"]))
                return f"pyramiddrop:layers={layers},ratios={'-'.join(map(str, method['image_token_ratio_list']))}"
            case "random":
                height, width = self.meta["grid"]
                return f"random:layer=0,keep={method['n'] / (height * width)}"
            case "pool":
                return f"pool:kernel={'x'.join(map(str, method['kernel']))},layer=0"
            case "divprune":
                return f"divprune:keep={method['ratio']}"
        raise AssertionError(method)

    @property
    def kept(self) -> list[list[int]] | None:
        """Per boundary the rows that the published code kept; None without an image, or where it pooled."""
        found = [self.arrays[key].tolist() for key in sorted(self.arrays) if key.startswith("keep_")]
        return found or None

    @property
    def has_image(self) -> bool:
        return bool((self.arrays["input_ids"] == -200).any())

    def prompt(self, **extra: Any) -> dict[str, Any]:
        """For `LLM.generate`."""
        ids = {"prompt_token_ids": self.arrays["input_ids"].tolist(), **extra}
        if not self.has_image:
            return ids
        media = {"image_embeds": self.tensor("image_features"), "image_grid": tuple(self.meta["grid"])}
        return {**ids, "multi_modal_data": media}

    @property
    def kv_lengths(self) -> list[int]:
        """Rows in the cache after the prefill, per stage."""
        lengths, stages = self.arrays["cache_len_prefill"], self.arrays["layer_stage"]
        return [int(lengths[np.flatnonzero(stages == stage)[0]]) for stage in range(int(stages.max()) + 1)]


CASES = tuple(ReducerCase(path.stem) for path in sorted(DIRECTORY.glob("*.npz")))
