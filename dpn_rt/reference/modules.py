"""The modules of the eager model: how they are made, loaded and saved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from dpn_rt.builders.names import NameMap, llama_modules, tower_modules, weight_names
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig, VisionConfig
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.reference import hf_modules, weights
from dpn_rt.reference.boundary import Boundary
from dpn_rt.reference.hr import HrTower
from dpn_rt.reference.open_config import OpenConfig
from dpn_rt.schema.dtypes import DType

if TYPE_CHECKING:
    from os import PathLike


class EagerModules(nn.Module):
    """The modules of a DPN or dense LLaVA model; `EagerDpn` runs them.

    `language_model` (LlamaModel or Qwen3Model), `lm_head`, `boundaries[b].router|experts`, `projector`, `vision`
    (CLIPVisionModel or SiglipVisionModel, cut after the layer that is used, or HrTower).

    Args:
        config: the model. Weights are random until they are loaded.
        dtype: of the weights; None: `config.dtype`. Routers are always float32.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = OpenConfig.of(config)
        decoder = config.decoder
        self.language_model = hf_modules.text_model(decoder)
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        if decoder.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight
            weights.store_tied_head_once(self)
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)
        self.boundaries = nn.ModuleList()
        if isinstance(config.reduction, PoolingConfig):
            for each in config.reduction.boundaries:
                self.boundaries.append(Boundary(each, config.reduction, decoder.hidden_size))
        self.projector = None if config.projector is None else _projector(config.projector, decoder.hidden_size)
        self.vision = None if config.vision is None else _tower(config.vision)
        self.stages = config.stage_layers
        self.to(dtype or getattr(torch, config.dtype))
        for boundary in self.boundaries:
            if cast(Boundary, boundary).router is not None:
                cast(nn.Module, boundary.router).float()

    @classmethod
    def from_engine(
        cls,
        path: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        copy: bool = True,
        verify: bool = True,
        with_images: bool = True,
    ) -> Self:
        """The model of an engine directory, in eval mode.

        Args:
            path: engine directory.
            dtype: of the weights; None: the engine's.
            copy: False lets the weights share the memory-mapped file (for inference).
            verify: compare the files' checksums first.
            with_images: False leaves out vision tower and projector.

        Raises:
            EngineError: the directory is incomplete or corrupt.
        """
        from dpn_rt.format.engine_dir import EngineDir

        engine = EngineDir.open(Path(path), verify=verify)
        model, stored = engine.model, engine.load_weights()
        if not with_images:
            model = replace(model, vision=None, projector=None)
            stored = {name: stored[name] for name in weight_spec(model)}
        return cls.from_weights(model, stored.items(), dtype=dtype, copy=copy)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        vision_tower: str | PathLike[str] | None = None,
        with_images: bool = True,
    ) -> Self:
        """The model of a checkpoint directory in any published layout, in eval mode.

        Builds a temporary engine directory and reads that, so that a checkpoint means the same here as in the runtime.

        Args:
            path: checkpoint directory.
            dtype: of the weights; None: the checkpoint's.
            vision_tower: directory of a vision tower, for a checkpoint without one.
            with_images: see `from_engine`.

        Raises:
            CheckpointError, ConfigError: as `build_engine` does.
        """
        from dpn_rt.builders.native import build_engine

        name = None if dtype is None else cast(DType, str(dtype).removeprefix("torch."))
        with tempfile.TemporaryDirectory(prefix="dpn_rt-eager-") as directory:
            target = Path(directory) / "engine"
            tower = None if vision_tower is None else Path(vision_tower)
            build_engine(Path(path), target, dtype=name, vision_tower=tower, quantize="none")
            return cls.from_engine(target, verify=False, with_images=with_images)

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        pairs: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype | None = None,
        copy: bool = True,
    ) -> Self:
        """The model with canonical (name, tensor) weights, in eval mode.

        Raises:
            CheckpointError: see `load_canonical`.
        """
        with torch.device("meta"):
            model = cls(config, dtype)
        hf_modules.restore_llama_buffers(model.language_model)
        if isinstance(model.vision, HrTower):
            model.vision.restore_unused()
        elif model.vision is not None:
            hf_modules.restore_clip_buffers(model.vision)
        weights.load_canonical(model, model.name_map(), pairs, copy)
        if config.decoder.tie_word_embeddings:
            model.lm_head.weight = model.language_model.embed_tokens.weight
        return model.eval()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations again in the backward pass instead of keeping them: less memory, more time.

        Args:
            options: those of the method of this name of transformers' models.
        """
        hf_modules.checkpoint_activations(self.language_model, options)
        if self.vision is not None:
            clip = self.vision.clip if isinstance(self.vision, HrTower) else self.vision
            hf_modules.checkpoint_activations(clip, options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """`activation_checkpointing_enable`, as older transformers' Trainer calls it."""
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def name_map(self) -> NameMap:
        """Canonical weight name -> names of this model's parameters.

        Routers, experts and projector have canonical names.
        """
        modules = llama_modules(self.config.decoder.num_layers, "language_model.", "lm_head")
        if isinstance(self.vision, HrTower):
            names = weight_names(weight_spec(self.config), modules | tower_modules(self.vision.config, ""))
            own = {published: f"vision.{name}" for name, published in self.vision.published_names().items()}
            return {canonical: tuple(own.get(part, part) for part in parts) for canonical, parts in names.items()}
        if self.vision is not None and self.config.vision is not None:
            modules |= tower_modules(self.config.vision, f"vision.{hf_modules.clip_prefix(self.vision)}")
        return weight_names(weight_spec(self.config), modules)

    def canonical_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Canonical (name, tensor) pairs, as `dpn_rt.format.engine_dir.write_engine` takes them."""
        return weights.canonical_weights(self, self.name_map(), self.config)

    def save_checkpoint(self, path: str | PathLike[str], extra_files: Iterable[str | PathLike[str]] = ()) -> None:
        """Write a checkpoint directory in the published original layout.

        Args:
            path: directory; made if missing.
            extra_files: tokenizer and image-processor files to copy to the directory.

        Raises:
            ConfigError, OSError: see `write_checkpoint`.
        """
        from dpn_rt.reference.checkpoint import write_checkpoint

        write_checkpoint(self, Path(path), [Path(file) for file in extra_files])


def sees_images(config: ModelConfig) -> bool:
    """Whether there is a tower for the model's images: not for those in tiles."""
    return not isinstance(config.vision, AnyresConfig)


def _tower(config: VisionConfig) -> hf_modules.Tower | HrTower:
    if isinstance(config, AnyresConfig):
        raise ConfigError("vision: the reference sees no images in tiles, expected None and image_embeds")
    return HrTower(config) if isinstance(config, HrConfig) else hf_modules.clip_tower(config)


def _projector(config: ProjectorConfig, hidden_size: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(config.input_size, hidden_size)]
    if config.type == "mlp2x_gelu":
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
