"""A checkpoint -> a model with routers and the files of its prompts, ready to be trained."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from dpn_rt.builders.layout import Note
from dpn_rt.builders.native import build_engine
from dpn_rt.builders.tokenizer_files import ROUTER_TOKEN
from dpn_rt.errors import CheckpointError, TrainingError
from dpn_rt.format.config import VisionConfig
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.prompts.processor import Processor
from dpn_rt.reference.add_routers import add_routers
from dpn_rt.reference.boundary import Boundary
from dpn_rt.reference.checkpoint import original_config
from dpn_rt.reference.model import EagerDpn
from dpn_rt.schema.files import VOCABULARY_BYTES, read_text
from dpn_rt.training.options import LossOptions, RouterOptions

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    model: EagerDpn
    """float32, in eval mode."""
    processor: Processor
    files: tuple[Path, ...]
    """Tokenizer and image processor of the written checkpoint."""
    is_new: bool
    """Whether the routers are random: the checkpoint was dense."""


def load_start(
    checkpoint: Path,
    vision_tower: Path | None,
    routers: RouterOptions,
    loss: LossOptions,
    folder: Path,
    note: Note = lambda line: None,
) -> Start:
    """Load a dense checkpoint and add routers, or load a DPN to train it further.

    Args:
        checkpoint: in any layout that the build command reads.
        vision_tower: directory of a vision tower, for a checkpoint without one.
        routers: of a dense checkpoint; a DPN has its own.
        loss: of the routers.
        folder: empty; gets the tokenizer's and the image processor's files.
        note: takes the lines that the build command prints as notes.

    Raises:
        CheckpointError, ConfigError: the checkpoint or the routers are wrong, as the build command says it.
        TrainingError: the checkpoint cannot be trained.
    """
    with tempfile.TemporaryDirectory(prefix="dpn_rt-train-") as directory:
        engine = build_engine(
            checkpoint,
            Path(directory) / "engine",
            dtype="float32",
            vision_tower=vision_tower,
            note=note,
            quantize="none",
        )
        model = EagerDpn.from_engine(engine.path, verify=False)
        prompt, vision = model.config.prompt, model.config.vision
        if not (prompt.has_tokenizer and prompt.has_image_processor):
            missing = "tokenizer" if not prompt.has_tokenizer else "image processor or vision tower (--vision-tower)"
            raise TrainingError(f"{checkpoint}: has no {missing}, expected one: conversations have texts and images")
        for file in engine.processor_path.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    _check_vision(checkpoint, vision)
    is_new = not model.config.reduction.layers
    if is_new:
        pooling = routers.pooling(model.config.decoder.num_layers)
        token_id, is_new_token = _add_router_token(folder / TOKENIZER)
        add_routers(model, pooling, token_id, is_new_token=is_new_token)
    else:
        _check_routers(checkpoint, model, routers)
    original_config(model)  # at once, rather than after the training: not every decoder can be written
    model.routing_loss_weight, model.routing_hinge_target = loss.routing_weight, loss.routing_target
    for boundary in model.boundaries:
        assert isinstance(boundary, Boundary)
        boundary.min_drawn_visual_tokens = loss.least_visual_tokens
    return Start(model, Processor(folder, model.config), tuple(sorted(folder.iterdir())), is_new)


def _check_vision(checkpoint: Path, vision: VisionConfig | None) -> None:
    if vision is None or len(vision.view_shapes) != 1:
        raise TrainingError(
            f"{checkpoint}: its vision tower sees an image more than once, expected LLaVA's CLIP or SigLIP"
        )


def _check_routers(checkpoint: Path, model: EagerDpn, routers: RouterOptions) -> None:
    """A DPN is trained further as it is."""
    reduction = model.config.reduction
    if not isinstance(reduction, PoolingConfig) or reduction.pooling_type != "adaptive":
        raise TrainingError(
            f"{checkpoint}: {reduction.summary} has no routers to train, expected a dense checkpoint or a DPN"
        )
    if not reduction.use_router_token:
        raise TrainingError(
            f"{checkpoint}: its routers read the last row of a prompt, which is the answer's in training: expected a "
            f"checkpoint whose routers read {ROUTER_TOKEN}"
        )
    if routers.given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in routers.given)
        raise TrainingError(f"{checkpoint}: has routers, which are trained further: expected no {names}")


def _add_router_token(file: Path) -> tuple[int, bool]:
    """Add `<ROUTER>` to a tokenizer that lacks it; its id, and whether it was added."""
    backend = tokenizers.Tokenizer.from_str(read_text(file, CheckpointError, VOCABULARY_BYTES))
    is_new = backend.token_to_id(ROUTER_TOKEN) is None
    backend.add_special_tokens([tokenizers.AddedToken(ROUTER_TOKEN, special=True, normalized=False)])
    file.write_text(backend.to_str(), encoding="utf-8")
    token_id = backend.token_to_id(ROUTER_TOKEN)
    assert token_id is not None
    return int(token_id), is_new


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype, *, frozen_only: bool) -> None:
    """Convert the weights of a model in place; routers stay float32.

    Args:
        model: an `EagerDpn`.
        dtype: to convert to.
        frozen_only: leave the weights that are trained.
    """
    for name, parameter in model.named_parameters():
        if ".router." not in name and not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)
