"""The DPN model in plain PyTorch on transformers' LLaMA and CLIP modules, one sample at a time.

It follows the published computation step by step and uses none of the runtime's kernels. Tests compare the runtime with
it, benchmarks use it as a baseline, and training runs on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig
from dpn_rt.model.reduction.grid import Grid
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.reference import hf_modules, training
from dpn_rt.reference.batch import forward_batch, is_batch, refuse_in_batch
from dpn_rt.reference.hf_modules import last_hidden
from dpn_rt.reference.hr import HrTower
from dpn_rt.reference.modules import EagerModules
from dpn_rt.reference.outputs import EagerBatchOutput, EagerGeneration, EagerOutput
from dpn_rt.reference.prompt import Route, as_token_list, check_image_embeds, check_route, layout_prompt
from dpn_rt.reference.trace import PyramidTrace, SampleLayout


class EagerDpn(EagerModules):
    """A DPN or dense LLaVA model.

    In training mode boundaries draw experts from the routers' probabilities; in eval mode they take the most probable
    one. Arguments and modules are those of `EagerModules`.

    Hugging Face's Trainer trains, saves and resumes it; `save_checkpoint` writes what the build command reads. A step's
    loss is the mean over its answer tokens, however they are spread over accumulated batches. Trainer's
    `label_smoothing_factor` must be 0, since the logits are those of the last stage's rows and not of the labels.
    """

    accepts_loss_kwargs = True
    """Trainer gives `num_items_in_batch` to `forward`, and does not divide the loss by the number of batches itself."""
    loss_type = "ForCausalLM"
    """Trainer then does not count a sample's first label, which nothing predicts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, dtype)
        self.routing_loss_weight = training.ROUTING_LOSS_WEIGHT
        self.routing_hinge_target = training.ROUTING_HINGE_TARGET

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.lm_head.weight.device

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run vision tower and projector on one image.

        Args:
            pixel_values: [3, side, side] or [1, 3, side, side] of the processed image.

        Returns:
            The visual rows [num_visual, hidden_size], in the tower's dtype.

        Raises:
            ImageError: the model has no vision tower, or the pixels have the wrong shape.
        """
        vision = self.config.vision
        if self.vision is None or vision is None or isinstance(vision, AnyresConfig):
            raise ImageError("this model has no vision tower; give image_embeds instead of pixel_values")
        pixels = pixel_values if pixel_values.dim() == 4 else pixel_values.unsqueeze(0)
        expected = (1, 3, vision.image_size, vision.image_size)
        if tuple(pixels.shape) != expected:
            raise ImageError(f"pixel_values: expected shape {expected}, got {tuple(pixel_values.shape)}")
        if isinstance(self.vision, HrTower):
            features = self.vision(pixels.to(self.device))[0]  # it scales the pixels before they are rounded
        else:
            assert isinstance(vision, ClipConfig)
            features = last_hidden(self.vision, pixels.to(self.device, self.vision.dtype))[0]
            features = features[vision.num_dropped_rows :]
        return cast(torch.Tensor, features if self.projector is None else self.projector(features))

    def embed(
        self,
        input_ids: torch.Tensor | Sequence[int],
        image_embeds: torch.Tensor | None = None,
        image_grid: Grid | None = None,
    ) -> tuple[torch.Tensor, SampleLayout]:
        """The rows of the first stage, in which the image's rows replace the placeholder.

        Args:
            input_ids: [num_ids], one id -200 for the image.
            image_embeds: [num_visual, hidden_size], rows after the projector; None without an image.
            image_grid: rows and columns of `image_embeds`; None: a square.

        Returns:
            The rows [num_rows, hidden_size] and their layout.

        Raises:
            RequestError, ImageError: see `layout_prompt` and `check_image_embeds`.
        """
        ids = as_token_list(input_ids)
        if image_embeds is not None:
            check_image_embeds(image_embeds, self.config.decoder.hidden_size)
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
            cache: gets keys and values; layers of different stages get different numbers of rows.

        Returns:
            The rows after the final norm [rows of the last stage, hidden_size], their layout, and the trace.

        Raises:
            RequestError: the route does not fit the model, or an expert's kernel is larger than the grid.
        """
        check_route(self.config, route)
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
        """Logits [vocab_size] after one more token. Its position in each layer is that layer's cached length.

        Args:
            token_id: the token.
            cache: of `prefill` and earlier calls; the token's keys and values are added.
        """
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
        # The cache is given by position, since its name differs between transformers' versions.
        options: dict[str, Any] = {"use_cache": cache is not None, "position_embeddings": rotary}
        keys = torch.arange(start + rows.shape[1], device=rows.device)
        for layer in layers:
            mask = hf_modules.window_mask(positions[0], keys, self.config.decoder.window(layer))
            rows = model.layers[layer](rows, mask, positions, cache, **options)
        return rows[0]

    def forward(
        self,
        input_ids: torch.Tensor | Sequence[int],
        pixel_values: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        image_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        image_grid: Grid | None = None,
        route: Route | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> EagerOutput | EagerBatchOutput:
        """Logits of every row, and the losses when `labels` are given.

        With an `attention_mask`, or with several rows of `input_ids`, it is a batch (see `forward_batch`): the result
        is an `EagerBatchOutput`, and `input_ids`, `attention_mask` and `labels` are [num_samples, num_ids], padded on
        the right, `pixel_values` [num_samples, 3, side, side] or a list with None for samples without an image. The
        other arguments are for single samples.

        Args:
            input_ids: [num_ids] or [1, num_ids], one id -200 for the image.
            pixel_values: [3, side, side] or [1, 3, side, side] of the processed image; give this or `image_embeds`,
                not both.
            image_embeds: [num_visual, hidden_size], rows after the projector.
            labels: [num_ids] or [1, num_ids], not shifted; -100 where nothing is to be learned.
            image_grid: rows and columns of `image_embeds`; None: a square.
            route: expert per boundary to force.
            attention_mask: of a batch: 1 for ids and 0 for padding.
            num_items_in_batch: answer tokens of the whole optimiser step. `loss` is then the batch's share of the
                step's loss, and the shares of accumulated batches add up to it. The hinge of the routing loss is that
                of each batch.

        Raises:
            RequestError, ImageError: the prompt, the image, the route or the labels are wrong; the message says how.
        """
        if is_batch(input_ids, attention_mask):
            refuse_in_batch(image_embeds=image_embeds, image_grid=image_grid, route=route)
            return forward_batch(self, input_ids, attention_mask, pixel_values, labels, num_items_in_batch)
        if isinstance(pixel_values, Sequence):
            raise ImageError("pixel_values: got a list, expected it for a batch; a single sample has a tensor")
        embeds, layout = self.embed_sample(input_ids, pixel_values, image_embeds, image_grid)
        hidden, layout, trace = self.prefill(embeds, layout, route)
        logits = self.lm_head(hidden)
        if labels is None:
            return EagerOutput(logits, trace)
        num_ids = len(as_token_list(input_ids))
        if labels.shape not in ((num_ids,), (1, num_ids)):
            raise RequestError(f"labels: expected shape [{num_ids}], one per prompt id, got {list(labels.shape)}")
        labels = labels.reshape(num_ids).to(self.device)
        language = training.language_loss(logits, training.expand_labels(labels, layout))
        routing = training.routing_loss([trace], self.routing_hinge_target).to(language.device)
        num_tokens = training.num_answer_tokens(labels)
        loss = training.share_of_step(language + self.routing_loss_weight * routing, num_tokens, num_items_in_batch)
        return EagerOutput(logits, trace, loss, language, routing)

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
        """Decode greedily until an end token, which is kept, or until `max_new_tokens` tokens.

        Args:
            max_new_tokens: at least 1.
            ignore_eos: go on after an end token.

        The other arguments, and errors, are those of `forward`.
        """
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        stop = () if ignore_eos else self.config.prompt.eos_token_ids
        cache = DynamicCache()
        embeds, layout = self.embed_sample(input_ids, pixel_values, image_embeds, image_grid)
        hidden, _, trace = self.prefill(embeds, layout, route, cache)
        all_logits = [cast(torch.Tensor, self.lm_head(hidden[-1]))]
        token_ids = [int(all_logits[0].argmax())]
        while len(token_ids) < max_new_tokens and token_ids[-1] not in stop:
            all_logits.append(self.decode(token_ids[-1], cache))
            token_ids.append(int(all_logits[-1].argmax()))
        lengths = tuple(cache.get_seq_length(layer) for layer in range(self.config.decoder.num_layers))
        return EagerGeneration(token_ids, torch.stack(all_logits), trace, lengths)

    def embed_sample(
        self,
        input_ids: torch.Tensor | Sequence[int],
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_grid: Grid | None = None,
    ) -> tuple[torch.Tensor, SampleLayout]:
        """As `embed`, of an image as pixels or as rows; the arguments are those of `forward` for one sample."""
        if pixel_values is not None:
            if image_embeds is not None:
                raise ImageError("give pixel_values or image_embeds, not both")
            if IMAGE_PLACEHOLDER_ID not in as_token_list(input_ids):
                raise ImageError(f"an image was given, but the prompt has no image placeholder {IMAGE_PLACEHOLDER_ID}")
            image_embeds = self.encode_image(pixel_values)
            vision = self.config.vision
            grid = None if vision is None else vision.grid
            if grid is not None and grid[0] * grid[1] == len(image_embeds):  # no class row
                image_grid = grid
        return self.embed(input_ids, image_embeds, image_grid)
