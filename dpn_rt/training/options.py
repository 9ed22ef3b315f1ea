"""What is trained and how, with the published recipe as defaults where it says anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpn_rt.errors import TrainingError
from dpn_rt.model.reduction.grid import Grid
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig, PoolingFunction, RouterVersion
from dpn_rt.reference.boundary import MIN_DRAWN_VISUAL_TOKENS
from dpn_rt.reference.training import ROUTING_HINGE_TARGET, ROUTING_LOSS_WEIGHT
from dpn_rt.schema.dtypes import DType

Part = Literal["tower", "projector", "decoder"]
"""What can be frozen; routers are always trained."""

NUM_BOUNDARIES = 3
MAX_LENGTH = 2048
WORK = "training"
"""Directory of Trainer's checkpoints, in that of the written one."""
KERNELS: tuple[Grid, ...] = ((1, 1), (1, 2), (2, 2))


@dataclass(frozen=True)
class RouterOptions:
    """New routers. None: the default, or what the checkpoint has."""

    pooling_layers: tuple[int, ...] | None = None
    """Decoder layers that boundaries follow; by default three that divide the decoder into four equal stages."""
    kernels: tuple[Grid, ...] | None = None
    """(height, width) of the experts' kernels."""
    router_version: RouterVersion | None = None
    pooling_function: PoolingFunction | None = None

    @property
    def given(self) -> list[str]:
        """Names of the options that are not None."""
        return [name for name, value in vars(self).items() if value is not None]

    def pooling(self, num_layers: int) -> PoolingConfig:
        """The boundaries of a decoder.

        Raises:
            TrainingError: it has too few layers for the default.
        """
        layers = self.pooling_layers
        if layers is None:
            if num_layers <= NUM_BOUNDARIES:
                raise TrainingError(f"a decoder of {num_layers} layers has no default, expected --pooling-layers")
            stage = num_layers / (NUM_BOUNDARIES + 1)
            layers = tuple(round(stage * (index + 1)) - 1 for index in range(NUM_BOUNDARIES))
        return PoolingConfig(
            boundaries=tuple(BoundaryConfig(layer, self.kernels or KERNELS) for layer in layers),
            pooling_function=self.pooling_function or "max",
            router_version=self.router_version or "v1",
            use_router_token=True,
        )


@dataclass(frozen=True)
class LossOptions:
    """The routing loss and the drawing of experts."""

    routing_weight: float = ROUTING_LOSS_WEIGHT
    routing_target: float = ROUTING_HINGE_TARGET
    least_visual_tokens: int = MIN_DRAWN_VISUAL_TOKENS
    """An expert that would leave fewer is not drawn."""


@dataclass(frozen=True)
class RunOptions:
    """The optimiser and its steps."""

    epochs: float = 1.0
    max_steps: int | None = None
    """Takes the place of `epochs`."""
    batch_size: int = 16
    accumulate: int = 8
    """Batches of a step; with `batch_size` LLaVA's 128 samples."""
    learning_rate: float = 2e-5
    router_learning_rate: float | None = None
    """None: `learning_rate`."""
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int | None = None
    """Rows of a sample, visual ones among them; None: 2048, or the model's positions where they are fewer."""
    bf16: bool = False
    recompute: bool = False
    """Compute activations again in the backward pass."""
    save_steps: int = 500
    keep: int = 1
    """Checkpoints that stay."""
    log_steps: int = 10
    workers: int = 4
    seed: int = 0
    cpu: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """Everything that the command was told."""

    checkpoint: Path
    data: Path
    output: Path
    image_folder: Path | None = None
    vision_tower: Path | None = None
    freeze: tuple[Part, ...] = ()
    lora: int | None = None
    """Rank of LoRA in the decoder's linear layers; None: without."""
    dtype: DType = "bfloat16"
    """Of the written weights; routers are float32."""
    skip_bad_rows: bool = False
    resume: bool = False
    quiet: bool = False
    routers: RouterOptions = RouterOptions()
    loss: LossOptions = LossOptions()
    run: RunOptions = RunOptions()

    @property
    def work(self) -> Path:
        """Directory of Trainer's checkpoints."""
        return self.output / WORK
