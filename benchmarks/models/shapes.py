"""Models of the benchmarks (published sizes, random weights) and their request."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig, PromptConfig
from dpn_rt.format.weight_spec import canonical_specs, weight_spec
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.hr.config import FastConfig, HrConfig, fast_image_size
from dpn_rt.model.vision.hr.convnext_config import ConvNextConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.model.weights.weight import QuantizedWeight
from dpn_rt.schema.dtypes import DType

KERNELS = ((1, 1), (1, 2), (2, 2))
ROUTER_TOKEN = 7
NUM_TEXT_ROWS = 64
TEXT_BEFORE_IMAGE = 35
"""Text ids before the image: about as many as the Vicuna system prompt has."""
TEXT_AFTER_ROUTER = 5
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA decoder and its vision tower."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    boundary_layers: tuple[int, int, int]
    vision: ClipConfig | HrConfig

    def model(self, dtype: DType) -> ModelConfig:
        """The model with the released pooling recipe (adaptive, max, v1 routers)."""
        return ModelConfig(
            dtype=dtype,
            decoder=DecoderConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.hidden_size // self.num_heads,
                rms_norm_eps=1e-5,
                rope=RopeConfig(10000.0),
                max_position_embeddings=4096,
                tie_word_embeddings=False,
                qkv_bias=False,
                o_bias=False,
            ),
            reduction=PoolingConfig(
                boundaries=tuple(BoundaryConfig(layer, KERNELS) for layer in self.boundary_layers),
                use_router_token=True,
            ),
            prompt=PromptConfig("vicuna_v1", "pad", 1, (2,), None, ROUTER_TOKEN, False, False),
            vision=self.vision,
            projector=ProjectorConfig("mlp2x_gelu", self.vision.hidden_size),
        )


CLIP_L_336 = ClipConfig(1024, 4096, 23, 16, 336, 14, 1e-5, "quick_gelu", "patch")
TINY_TOWER = ClipConfig(64, 128, 2, 4, 336, 14, 1e-5, "quick_gelu", "patch")

CONVNEXT_L = ConvNextConfig((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6)
CONVNEXT_XXL = ConvNextConfig((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5)


def hr_tower(slow: ConvNextConfig, image_size: int, fast: tuple[int, int, int, int]) -> HrConfig:
    """A LLaVA-HR tower; `fast` is CLIP's width, width of its MLPs, layers and heads."""
    clip = FastConfig(*fast, fast_image_size(image_size), 14, 1e-5, "quick_gelu", "patch")
    return HrConfig(image_size, slow, clip, has_adapters=True, prepools=False)


HR_L = hr_tower(CONVNEXT_L, 1024, (1024, 4096, 24, 16))
HR_XXL = hr_tower(CONVNEXT_XXL, 1024, (1024, 4096, 24, 16))
TINY_HR = hr_tower(ConvNextConfig((1, 1, 2, 1), (16, 32, 48, 64), 1e-6), 768, (64, 128, 4, 4))

SHAPES = {
    "tiny": Shape(128, 352, 8, 4, 2, 512, (1, 3, 5), TINY_TOWER),
    "llava-1b": Shape(2048, 5632, 22, 32, 4, 32064, (5, 11, 17), CLIP_L_336),
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 32, 32064, (7, 15, 23), CLIP_L_336),
    "llava-1.5-13b": Shape(5120, 13824, 40, 40, 40, 32064, (9, 19, 29), CLIP_L_336),
    "tiny-hr": Shape(128, 352, 8, 4, 2, 512, (1, 3, 5), TINY_HR),
    "llava-hr-1b": Shape(2048, 5632, 22, 32, 4, 32064, (5, 11, 17), HR_L),
    "llava-hr-7b": Shape(4096, 11008, 32, 32, 32, 32064, (7, 15, 23), HR_L),
    "llava-hr-x-13b": Shape(5120, 13824, 40, 40, 40, 32064, (9, 19, 29), HR_XXL),
}


class RandomWeights:
    """`CanonicalWeights` of a model, made one at a time; each depends on its name and the seed alone.

    Matrices are cut from one block of normal numbers. Their values do not change how long a multiplication takes, and
    drawing billions of numbers would take longer than the benchmark. Routes are forced, so the values of the routers'
    weights do not matter either.
    """

    def __init__(self, model: ModelConfig, seed: int = 0, device: str | torch.device = "cpu") -> None:
        """`device`: where the weights are made; their values are the same on all."""
        self._specs, self._seed = canonical_specs(model), seed
        block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * WEIGHT_STD
        self._block = block.to(device)

    def read(self, name: str) -> torch.Tensor:
        """See `CanonicalWeights`."""
        spec = self._specs[name]
        if "norm" in name:
            value = torch.ones if name.endswith("weight") else torch.zeros
            return value(spec.shape, dtype=spec.dtype, device=self._block.device)
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._block.device)
        flat, source = tensor.view(-1), self._block.to(spec.dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        start = int(torch.randint(len(source) // 2, (), generator=generator))
        for offset in range(0, len(flat), len(source) - start):
            part = flat[offset : offset + len(source) - start]
            part.copy_(source[start : start + len(part)])
        return tensor

    def published_scale(self, name: str, form: type[QuantizedWeight]) -> None:
        """None."""


def random_weights(
    model: ModelConfig, seed: int = 0, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of an engine that is not quantised, in its order, made on `device`."""
    weights = RandomWeights(model, seed, device)
    return ((name, weights.read(name)) for name in weight_spec(model))


def prompt_token_ids(model: ModelConfig) -> list[int]:
    """64 text ids and the placeholder of the image: 640 rows with 576 visual tokens."""
    low, high = ROUTER_TOKEN + 1, model.decoder.vocab_size
    text = [1, *((low + 37 * i) % (high - low) + low for i in range(NUM_TEXT_ROWS - 2))]
    after_image = text[TEXT_BEFORE_IMAGE:]
    cut = len(after_image) - TEXT_AFTER_ROUTER
    return [
        *text[:TEXT_BEFORE_IMAGE],
        IMAGE_PLACEHOLDER_ID,
        *after_image[:cut],
        ROUTER_TOKEN,
        *after_image[cut:],
    ]
