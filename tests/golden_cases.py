"""The reference data of tests/golden as checkpoints, prompts and expectations (see golden/README.md)."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dpn_rt.format.config import ModelConfig, PromptConfig
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig

DIRECTORY = Path(__file__).parent / "golden"
MAX_POSITIONS = 2048
NUM_GENERATED = 7

ROUTER_PARTS = {
    "norm.weight": "mlp1.0.weight",
    "norm.bias": "mlp1.0.bias",
    "hidden.weight": "mlp1.1.weight",
    "predictor.weight": "predictor.weight",
}


@dataclass(frozen=True)
class GoldenCase:
    """One file: a model, a prompt and what the published code computed from them."""

    name: str

    @property
    def directory(self) -> Path:
        return DIRECTORY

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / f"{self.name}.npz") as file:
            return {key: file[key] for key in file.files}

    @cached_property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads(bytes(self.arrays["meta"]).decode())
        return meta

    def tensor(self, key: str) -> torch.Tensor:
        """One array; float16 becomes float32 (exact by construction of the data)."""
        array = self.arrays[key]
        return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array.copy())

    # The model

    @property
    def decoder(self) -> DecoderConfig:
        meta = self.meta
        return DecoderConfig(
            vocab_size=meta["vocab"],
            hidden_size=meta["hidden"],
            intermediate_size=meta["inter"],
            num_layers=meta["layers"],
            num_heads=meta["heads"],
            num_kv_heads=meta["heads"],
            head_dim=meta["head_dim"],
            rms_norm_eps=meta["rms_norm_eps"],
            rope=RopeConfig(meta["rope_theta"]),
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            qkv_bias=False,
            o_bias=False,
        )

    @property
    def config(self) -> ModelConfig:
        meta, pooling = self.meta, self.meta["pooling"]
        static = pooling["pooling_type"] == "static"
        boundaries = []
        for layer in pooling["pooling_layers"]:
            kernels = [layer["kernel_size"]] if static else layer["kernel_size"]
            boundaries.append(BoundaryConfig(layer["index"], tuple((k[0], k[1]) for k in kernels)))
        return ModelConfig(
            dtype="float32",
            decoder=self.decoder,
            reduction=PoolingConfig(
                boundaries=tuple(boundaries),
                pooling_type=pooling["pooling_type"],
                pooling_function=pooling["pooling_function"],
                router_version=pooling["router_version"],
                use_router_token=pooling["use_special_token"],
            ),
            prompt=PromptConfig(
                template="vicuna_v1",
                image_aspect_ratio="pad",
                bos_token_id=1,
                eos_token_ids=(2,),
                image_token_id=None,
                router_token_id=meta["router_id"],
                has_tokenizer=False,
                has_image_processor=False,
            ),
            vision=None,
            projector=None,
        )

    def original_weights(self) -> dict[str, torch.Tensor]:
        """Weights under the published names."""
        return {key[2:]: self.tensor(key) for key in self.arrays if key.startswith("w/")}

    def canonical_weights(self) -> dict[str, torch.Tensor]:
        """Weights under an engine's names. This fuses them itself, so that it and the builders check each other."""
        source = self.original_weights()
        result = {
            "embed_tokens.weight": source["model.embed_tokens.weight"],
            "norm.weight": source["model.norm.weight"],
            "lm_head.weight": source["lm_head.weight"],
        }
        for layer in range(self.meta["layers"]):
            old, new = f"model.layers.{layer}.", f"layers.{layer}."
            attention, mlp = f"{old}self_attn.", f"{old}mlp."
            result[f"{new}input_norm.weight"] = source[f"{old}input_layernorm.weight"]
            result[f"{new}post_norm.weight"] = source[f"{old}post_attention_layernorm.weight"]
            result[f"{new}qkv.weight"] = torch.cat([source[f"{attention}{x}_proj.weight"] for x in "qkv"])
            result[f"{new}o.weight"] = source[f"{attention}o_proj.weight"]
            result[f"{new}gate_up.weight"] = torch.cat([source[f"{mlp}{x}_proj.weight"] for x in ("gate", "up")])
            result[f"{new}down.weight"] = source[f"{mlp}down_proj.weight"]
        for b, layer in enumerate(self.meta.get("pool_at", ())):
            for new, old in ROUTER_PARTS.items():
                key = f"model.layers.{layer}.pooling_router.{old}"
                if key in source:
                    result[f"boundaries.{b}.router.{new}"] = source[key]
            for expert in range(3):
                key = f"model.layers.{layer}.experts.{expert}.weight"
                if key in source:  # [H, 1, kh, kw] -> [kh * kw, H]
                    result[f"boundaries.{b}.experts.{expert}.weight"] = source[key].flatten(1).t().contiguous()
        return result

    def write_checkpoint(self, directory: Path, *, file_format: str = "safetensors") -> Path:
        """Write the model as a checkpoint directory in the original layout, without tokenizer and vision tower."""
        meta = self.meta
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "vocab_size": meta["vocab"],
            "hidden_size": meta["hidden"],
            "intermediate_size": meta["inter"],
            "num_hidden_layers": meta["layers"],
            "num_attention_heads": meta["heads"],
            "num_key_value_heads": meta["heads"],
            "hidden_act": "silu",
            "rms_norm_eps": meta["rms_norm_eps"],
            "rope_theta": meta["rope_theta"],
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "router_token_id": meta["router_id"],
            "pooling": meta["pooling"],
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        if file_format == "safetensors":
            save_file(self.original_weights(), directory / "model.safetensors")
        else:
            torch.save(self.original_weights(), directory / "pytorch_model.bin")
        return directory

    # The prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        ids: list[int] = self.arrays["input_ids"].tolist()
        return ids

    @property
    def has_image(self) -> bool:
        return self.meta["image_id"] in self.prompt_token_ids

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of visual tokens, None for text only."""
        height, width = self.arrays["vision_map_shape"].tolist()
        return (height, width) if self.has_image else None

    @property
    def image_embeds(self) -> torch.Tensor | None:
        """[num_visual, hidden_size] float32, None for text only."""
        return self.tensor("image_features") if self.has_image else None

    def request(self) -> dict[str, Any]:
        """The prompt as `LLM.generate` takes it."""
        request: dict[str, Any] = {"prompt_token_ids": self.prompt_token_ids}
        if self.has_image:
            request["multi_modal_data"] = {"image_embeds": self.image_embeds}
        return request

    # What must come out

    @property
    def generated_ids(self) -> list[int]:
        ids: list[int] = self.arrays["generate_ids"].tolist()
        return ids

    @cached_property
    def logits(self) -> torch.Tensor:
        """[7, vocab_size]: the logits of each generated token."""
        return torch.cat((self.tensor("logits")[-1:], self.tensor("decode_logits")))

    @cached_property
    def logprobs(self) -> torch.Tensor:
        """[7, vocab_size]: log-probabilities over the whole vocabulary."""
        return torch.log_softmax(self.logits.double(), dim=-1)

    @property
    def pooled(self) -> list[bool]:
        """Per boundary, whether it pooled (also with the 1x1 expert) and did not skip the sample."""
        if self.meta["ptype"] == "static":
            rows = self.visual_tokens
            return [after < before for before, after in itertools.pairwise(rows)]
        ran = self.arrays["pool_layer_idx"].tolist()
        return [layer in ran for layer in self.meta["pool_at"]]

    @property
    def experts(self) -> list[int | None]:
        """Expert per boundary, None where the boundary was skipped; a static boundary has only expert 0."""
        taken = iter([0] * 3 if self.meta["ptype"] == "static" else self.arrays["pool_expert"].tolist())
        return [next(taken) if pooled else None for pooled in self.pooled]

    @property
    def probs(self) -> list[list[float] | None]:
        """Routing probabilities per boundary, None where no router ran."""
        rows = iter(self.arrays["pool_probs"].tolist() if "pool_probs" in self.arrays else [])
        routed = self.meta["ptype"] == "adaptive"
        return [next(rows) if pooled and routed else None for pooled in self.pooled]

    @property
    def first_layers(self) -> list[int]:
        """First decoder layer of every stage."""
        return [0, *(layer + 1 for layer in self.meta["pool_at"])]

    @property
    def visual_tokens(self) -> list[int]:
        """Visual rows per stage."""
        after = self.arrays["layer_num_vision"].tolist()
        first = self.grid[0] * self.grid[1] if self.grid else 0
        return [first, *(after[layer] for layer in self.meta["pool_at"])]

    @property
    def kv_lengths(self) -> list[int]:
        """Cached rows per stage after prefill."""
        lengths = self.arrays["cache_len_prefill"].tolist()
        return [lengths[layer] for layer in self.first_layers]


CASES = tuple(GoldenCase(path.stem) for path in sorted(DIRECTORY.glob("*.npz")))


def case_named(name: str) -> GoldenCase:
    """The case of one file, without `.npz`."""
    return next(case for case in CASES if case.name == name)


def prompts_for(case: GoldenCase) -> list[GoldenCase]:
    """Cases whose image embeddings fit the model of `case`."""
    return [other for other in CASES if other.meta["hidden"] == case.meta["hidden"]]
