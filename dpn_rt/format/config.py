"""Frozen configuration of an engine: it describes the model, and never how the model is run.

Every class maps to one object of `engine.json`. The parts of a model define their own configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.model.vision.siglip.config import SiglipConfig
from dpn_rt.schema.bounds import FEW, TokenId
from dpn_rt.schema.dtypes import DType, Quantize

AspectRatio = Literal["pad", "processor"]
PromptTemplate = Literal["vicuna_v1", "tokenizer"]

VisionConfig = ClipConfig | SiglipConfig | HrConfig | AnyresConfig
"""Configurations of vision encoders, distinguished by their `type`; add a new encoder to this union."""
ReductionConfig = PoolingConfig | Chain | NoReduction
"""Configurations of reducers, distinguished by their `method`; add a new reducer to this union."""

IMAGE_PLACEHOLDER_ID = -200
"""Stands for an image among prompt token ids (as in LLaVA): one id for all visual tokens of the image."""

OLDEST_CAPABILITY = (8, 0)
"""Oldest compute capability of a GPU that the CUDA kernels are built for."""


@dataclass(frozen=True)
class PromptConfig:
    """Special tokens, and how text and image become a prompt."""

    template: PromptTemplate
    image_aspect_ratio: AspectRatio
    bos_token_id: TokenId | None
    eos_token_ids: Annotated[tuple[TokenId, ...], FEW]
    image_token_id: TokenId | None
    """The tokenizer's own id of `<image>`, where it has one."""
    router_token_id: TokenId | None
    has_tokenizer: bool
    has_image_processor: bool


@dataclass(frozen=True)
class ModelConfig:
    """Everything about the model that an engine holds."""

    dtype: DType
    decoder: DecoderConfig
    reduction: ReductionConfig
    prompt: PromptConfig
    vision: VisionConfig | None
    projector: ProjectorConfig | None
    quantize: Quantize = "none"

    @property
    def stage_layers(self) -> tuple[range, ...]:
        """Decoder layers of each stage."""
        return stage_layers(self.reduction.layers, self.decoder.num_layers)


def stage_layers(boundary_layers: tuple[int, ...], num_layers: int) -> tuple[range, ...]:
    """Decoder layers of each stage. A stage ends with the layer of a boundary; the last stage ends with the last layer.

    Args:
        boundary_layers: layers after which rows are reduced, ascending.
        num_layers: of the decoder.
    """
    starts = [0, *(layer + 1 for layer in boundary_layers)]
    ends = [*starts[1:], num_layers]
    return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))
