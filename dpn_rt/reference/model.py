"""The DPN model in plain PyTorch on transformers' LLaMA and CLIP modules, one sample at a time.

It is the reference of the tests, the baseline of the benchmarks and the model that is trained: a direct transcription
of the published computation, with none of the runtime's kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import CLIPVisionModel, DynamicCache, LlamaModel

from dpn_rt.builders.names import NameMap, clip_modules, llama_modules, weight_names
from dpn_rt.errors import ImageError, RequestError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.reference import hf_modules, training, weights
from dpn_rt.reference.boundary import Boundary
from dpn_rt.reference.prompt import as_token_list, layout_prompt
from dpn_rt.reference.trace import PyramidTrace, SampleLayout
from dpn_rt.schema.weights import DType

if TYPE_CHECKING:
    from os import PathLike

Grid = tuple[int, int]
Route = Sequence[int | None]
"""Expert per boundary to force; None leaves the choice to the router, so that a trace's `experts` can be replayed."""


@dataclass(frozen=True, slots=True)
class EagerOutput:
    """One forward pass over one sample."""

    logits: torch.Tensor
    """[rows of the last stage, vocab_size]."""
    trace: PyramidTrace
    loss: torch.Tensor | None = None
    """language_loss + routing_loss_weight * routing_loss; None without labels."""
    language_loss: torch.Tensor | None = None
    routing_loss: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class EagerGeneration:
    """Greedy generation for one sample."""

    token_ids: list[int]
    logits: torch.Tensor
    """[len(token_ids), vocab_size]: what each token was chosen from."""
    trace: PyramidTrace
    kv_lengths: tuple[int, ...]
    """Rows in every layer's cache at the end, one entry per layer."""


class EagerDpn(nn.Module):
    """A DPN or dense LLaVA model.

    Parameters: `language_model` (LlamaModel), `lm_head`, `boundaries[b].router|experts`, `projector`, `vision`
    (CLIPVisionModel cut after the layer that is used). In training mode experts are drawn, in eval mode chosen.

    Args:
        config: the model; weights are random until loaded.
        dtype: of the weights, `config.dtype` if not given. Routers are always float32.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.routing_loss_weight = training.ROUTING_LOSS_WEIGHT
        self.routing_hinge_target = training.ROUTING_HINGE_TARGET
        decoder = config.decoder
        self.language_model = LlamaModel(hf_modules.llama_config(decoder))
        hf_modules.drop_biases(self.language_model, decoder)
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        if decoder.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)
        self.boundaries = nn.ModuleList()
        if isinstance(config.reduction, PoolingConfig):
            for each in config.reduction.boundaries:
                self.boundaries.append(Boundary(each, config.reduction, decoder.hidden_size))
        self.projector = None if config.projector is None else _projector(config.projector, decoder.hidden_size)
        self.vision = None if config.vision is None else CLIPVisionModel(hf_modules.clip_config(config.vision))
        self.stages = config.stage_layers
        self.to(dtype or getattr(torch, config.dtype))
        for boundary in self.boundaries:
            if cast(Boundary, boundary).router is not None:
                cast(nn.Module, boundary.router).float()

    # Loading and saving

    @classmethod
    def from_engine(
        cls, path: str | PathLike[str], *, dtype: torch.dtype | None = None, copy: bool = True, verify: bool = True
    ) -> EagerDpn:
        """The model of an engine directory, in eval mode.

        Args:
            path: engine directory.
            dtype: of the weights; the engine's if not given.
            copy: False shares the memory-mapped file instead of copying it (for inference).
            verify: compare the files' checksums first.

        Raises:
            EngineError: the directory is incomplete or corrupt.
        """
        from dpn_rt.format.engine_dir import EngineDir

        engine = EngineDir.open(Path(path), verify=verify)
        return cls.from_weights(engine.model, engine.load_weights().items(), dtype=dtype, copy=copy)

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> EagerDpn:
        """The model of a checkpoint directory in any published layout, in eval mode.

        It takes the way through a temporary engine directory, so that a checkpoint means the same here as there.

        Raises:
            CheckpointError, ConfigError: as `build_engine` does.
        """
        from dpn_rt.builders.native import build_engine

        name = None if dtype is None else cast(DType, str(dtype).removeprefix("torch."))
        with tempfile.TemporaryDirectory(prefix="dpn_rt-eager-") as directory:
            build_engine(Path(path), Path(directory) / "engine", dtype=name)
            return cls.from_engine(Path(directory) / "engine", verify=False)

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        pairs: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype | None = None,
        copy: bool = True,
    ) -> EagerDpn:
        """The model with canonical (name, tensor) weights, in eval mode; see `load_canonical` for errors."""
        with torch.device("meta"):
            model = cls(config, dtype)
        hf_modules.restore_llama_buffers(model.language_model)
        if model.vision is not None:
            hf_modules.restore_clip_buffers(model.vision)
        weights.load_canonical(model, model.name_map(), pairs, copy)
        if config.decoder.tie_word_embeddings:
            model.lm_head.weight = model.language_model.embed_tokens.weight
        return model.eval()

    def name_map(self) -> NameMap:
        """Canonical weight -> parameters of this model; routers, experts and projector have canonical names."""
        modules = llama_modules(self.config.decoder.num_layers, "language_model.", "lm_head")
        if self.vision is not None and self.config.vision is not None:
            modules |= clip_modules(self.config.vision.num_layers, f"vision.{hf_modules.clip_prefix(self.vision)}")
        return weight_names(weight_spec(self.config), modules)

    def canonical_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Canonical (name, tensor) pairs, as `dpn_rt.format.engine_dir.write_engine` takes them."""
        return weights.canonical_weights(self, self.name_map(), self.config)

    def save_checkpoint(self, path: str | PathLike[str], extra_files: Iterable[str | PathLike[str]] = ()) -> None:
        """Write a checkpoint directory in the published original layout.

        Args:
            path: directory; made if missing.
            extra_files: tokenizer and image-processor files to copy beside the weights.
        """
        from dpn_rt.reference.checkpoint import write_checkpoint

        write_checkpoint(self, Path(path), [Path(file) for file in extra_files])

    # Running

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[3, side, side] or [1, 3, side, side] -> projected visual rows [num_visual, hidden_size].

        Raises:
            ImageError: the model has no vision tower, or the pixels have the wrong shape.
        """
        vision = self.config.vision
        if self.vision is None or vision is None:
            raise ImageError("this model has no vision tower; give image_embeds instead of pixel_values")
        pixels = pixel_values if pixel_values.dim() == 4 else pixel_values.unsqueeze(0)
        expected = (1, 3, vision.image_size, vision.image_size)
        if tuple(pixels.shape) != expected:
            raise ImageError(f"pixel_values: expected shape {expected}, got {tuple(pixel_values.shape)}")
        features = self.vision(pixels.to(self.device, self.vision.dtype)).last_hidden_state[0]
        features = features[1:] if vision.select_feature == "patch" else features
        return cast(torch.Tensor, features if self.projector is None else self.projector(features))

    def embed(
        self,
        input_ids: torch.Tensor | Sequence[int],
        image_embeds: torch.Tensor | None = None,
        image_grid: Grid | None = None,
    ) -> tuple[torch.Tensor, SampleLayout]:
        """Rows of the first stage [num_rows, hidden_size] and their layout; the image replaces its placeholder.

        Raises:
            RequestError, ImageError: see `layout_prompt`; embeddings of the wrong shape or not finite.
        """
        ids = as_token_list(input_ids)
        if image_embeds is not None:
            hidden_size = self.config.decoder.hidden_size
            if image_embeds.dim() != 2 or image_embeds.shape[1] != hidden_size or not len(image_embeds):
                shape = tuple(image_embeds.shape)
                raise ImageError(f"image_embeds: expected shape [num_visual > 0, {hidden_size}], got {shape}")
            if not bool(torch.isfinite(image_embeds).all()):
                raise ImageError("image_embeds: every value must be finite")
        num_visual = None if image_embeds is None else len(image_embeds)
        layout = layout_prompt(self.config, ids, num_visual, image_grid)
        table = self.language_model.embed_tokens
        if image_embeds is None:
            return table(torch.tensor(ids, device=self.device)), layout
        before = torch.tensor(ids[: layout.image_start], dtype=torch.long, device=self.device)
        after = torch.tensor(ids[layout.image_start + 1 :], dtype=torch.long, device=self.device)
        visual = image_embeds.to(self.device, table.weight.dtype)
        return torch.cat((table(before), visual, table(after))), layout

    def prefill(
        self,
        embeds: torch.Tensor,
        layout: SampleLayout,
        route: Route | None = None,
        cache: DynamicCache | None = None,
    ) -> tuple[torch.Tensor, SampleLayout, PyramidTrace]:
        """Run all stages.

        Args:
            embeds: [layout.num_rows, hidden_size].
            layout: of the first stage.
            route: expert per boundary to force; a boundary that skips the sample ignores its entry.
            cache: filled with one length per layer.

        Returns:
            rows after the final norm [rows of the last stage, hidden_size], their layout, and the trace.
        """
        self._check_route(route)
        hidden, records, layouts = embeds, [], [layout]
        for stage, layers in enumerate(self.stages):
            hidden = self._run_layers(hidden, layers, 0, cache)
            if stage < len(self.boundaries):
                forced = None if route is None else route[stage]
                hidden, layout, record = self.boundaries[stage](hidden, layout, forced)
                records.append(record)
                layouts.append(layout)
        trace = PyramidTrace(
            records=tuple(records),
            visual_tokens=tuple(item.num_visual for item in layouts),
            kv_lengths=tuple(item.num_rows for item in layouts),
            grids=tuple(item.grid for item in layouts),
        )
        return self.language_model.norm(hidden), layout, trace

    def decode(self, token_id: int | torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [vocab_size] after one more token; its position in a layer is that layer's own cached length."""
        token = torch.as_tensor(token_id, device=self.device).reshape(1)
        hidden = self.language_model.embed_tokens(token)
        for layers in self.stages:
            if layers:
                hidden = self._run_layers(hidden, layers, cache.get_seq_length(layers[0]), cache)
        return cast(torch.Tensor, self.lm_head(self.language_model.norm(hidden)))[0]

    def _run_layers(self, hidden: torch.Tensor, layers: range, start: int, cache: DynamicCache | None) -> torch.Tensor:
        model = self.language_model
        rows = hidden.unsqueeze(0)
        positions = torch.arange(start, start + rows.shape[1], device=rows.device).unsqueeze(0)
        rotary = model.rotary_emb(rows, position_ids=positions)
        # No mask: sdpa's own causal mode while the cache is empty, and one row sees everything.
        options: dict[str, Any] = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary}
        for layer in layers:
            rows = model.layers[layer](rows, past_key_values=cache, use_cache=cache is not None, **options)
        return rows[0]

    def forward(
        self,
        input_ids: torch.Tensor | Sequence[int],
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        image_grid: Grid | None = None,
        route: Route | None = None,
    ) -> EagerOutput:
        """Logits of every row, and the losses when `labels` are given.

        Args:
            input_ids: [num_ids], the image as one id -200.
            pixel_values: [3, side, side] of the processed image, or
            image_embeds: [num_visual, hidden_size], rows after the projector.
            labels: [num_ids], -100 where nothing is to be learned; shifted here.
            image_grid: rows and columns of `image_embeds`; a square if not given.
            route: expert per boundary to force.

        Raises:
            RequestError: anything about the prompt, the image or the route that cannot be; the message says what.
        """
        embeds, layout = self._embed_sample(input_ids, pixel_values, image_embeds, image_grid)
        hidden, layout, trace = self.prefill(embeds, layout, route)
        logits = self.lm_head(hidden)
        if labels is None:
            return EagerOutput(logits, trace)
        if labels.shape != (len(as_token_list(input_ids)),):
            raise RequestError(f"labels: expected one per prompt id, got shape {tuple(labels.shape)}")
        language = training.language_loss(logits, training.expand_labels(labels.to(self.device), layout))
        routing = training.routing_loss([trace], self.routing_hinge_target).to(language.device)
        return EagerOutput(logits, trace, language + self.routing_loss_weight * routing, language, routing)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[int],
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        image_grid: Grid | None = None,
        route: Route | None = None,
        ignore_eos: bool = False,
    ) -> EagerGeneration:
        """Greedy decoding until an end token (which is kept) or `max_new_tokens`; arguments and errors as `forward`."""
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        stop = () if ignore_eos else self.config.prompt.eos_token_ids
        cache = DynamicCache()
        embeds, layout = self._embed_sample(input_ids, pixel_values, image_embeds, image_grid)
        hidden, _, trace = self.prefill(embeds, layout, route, cache)
        all_logits = [cast(torch.Tensor, self.lm_head(hidden[-1]))]
        token_ids = [int(all_logits[0].argmax())]
        while len(token_ids) < max_new_tokens and token_ids[-1] not in stop:
            all_logits.append(self.decode(token_ids[-1], cache))
            token_ids.append(int(all_logits[-1].argmax()))
        lengths = tuple(cache.get_seq_length(layer) for layer in range(self.config.decoder.num_layers))
        return EagerGeneration(token_ids, torch.stack(all_logits), trace, lengths)

    def _embed_sample(
        self,
        input_ids: torch.Tensor | Sequence[int],
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        image_grid: Grid | None,
    ) -> tuple[torch.Tensor, SampleLayout]:
        if pixel_values is not None:
            if image_embeds is not None:
                raise ImageError("give pixel_values or image_embeds, not both")
            if IMAGE_PLACEHOLDER_ID not in as_token_list(input_ids):
                raise ImageError(f"an image was given, but the prompt has no image placeholder {IMAGE_PLACEHOLDER_ID}")
            image_embeds = self.encode_image(pixel_values)
            if self.config.vision is not None and self.config.vision.select_feature == "patch":
                image_grid = self.config.vision.grid
        return self.embed(input_ids, image_embeds, image_grid)

    def _check_route(self, route: Route | None) -> None:
        if route is None:
            return
        counts = list(self.config.reduction.num_experts)
        if len(route) != len(counts) or not all(e is None or 0 <= e < n for e, n in zip(route, counts, strict=False)):
            raise RequestError(f"route {list(route)}: expected one expert per boundary, each below {counts}")


def _projector(config: ProjectorConfig, hidden_size: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(config.input_size, hidden_size)]
    if config.type == "mlp2x_gelu":
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
