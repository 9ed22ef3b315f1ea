"""Training-free reduction in plain PyTorch on transformers' modules, one sample with at most one image at a time.

It follows the published computations step by step and uses none of the runtime's kernels. Tests compare the runtime
with it, and benchmarks use it as a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.grid import Grid, Segments, as_grid, num_visual
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.step import BEFORE_LLM, Cut
from dpn_rt.reference.hf_modules import window_mask
from dpn_rt.reference.model import EagerDpn


@dataclass(frozen=True)
class ReducedGeneration:
    """A greedy completion of a prompt whose visual rows were reduced."""

    token_ids: list[int]
    logits: Tensor
    """`[num_tokens, vocab_size]`, before each token."""
    kept: list[list[int] | None]
    """Per boundary of the chain the visual rows that it left, by their numbers at the start; None where it pooled."""
    kv_lengths: tuple[int, ...]
    """Per layer, after the prefill."""


@dataclass(frozen=True)
class _Rows:
    """One sample between two layers."""

    hidden: Tensor
    """`[num_rows, hidden_size]`."""
    positions: Tensor
    """`[num_rows]`."""
    visual: Tensor
    """`[num_visual]` ascending rows that are visual tokens."""
    ids: Tensor
    """`[num_visual]` number of each visual token at the start, or after the last pooling."""
    segments: Segments
    """Grids of the visual tokens; one (1, n) where they are no grid."""
    next_position: int


@dataclass(frozen=True)
class _Cache:
    """Keys and values, and the position of each row of a layer that is there."""

    rows: DynamicCache
    positions: dict[int, Tensor]


class EagerReduced:
    """A dense LLaVA model whose visual rows a chain reduces."""

    def __init__(self, model: EagerDpn, chain: Chain) -> None:
        """Args: model: without boundaries, in eval mode."""
        self._model, self._chain = model, chain

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Sequence[int],
        image_embeds: Tensor | None = None,
        *,
        image_grid: Grid | None = None,
        image_segments: Segments | None = None,
        newline_rows: Sequence[int] = (),
        kept: Sequence[Sequence[int] | None] | None = None,
        max_new_tokens: int = 32,
    ) -> ReducedGeneration:
        """Decodes greedily, past end tokens.

        Args:
            input_ids: with one id -200 for the image.
            image_embeds: `[num_rows, hidden_size]`, rows after the projector; None without an image.
            image_grid: rows and columns of `image_embeds`; None: a square, or what `image_segments` says.
            image_segments: grids of an image with several parts.
            newline_rows: rows of `image_embeds` that belong to no grid.
            kept: forced rows per boundary, as in `ReducedGeneration`; None: the chain decides.
            max_new_tokens: at least 1.
        """
        if image_segments is not None and image_embeds is not None:
            image_grid = (1, len(image_embeds))
        embeds, layout = self._model.embed(input_ids, image_embeds, image_grid)
        rows_of_image = () if layout.grid is None else range(layout.grid[0] * layout.grid[1])
        newlines = set(newline_rows)
        visual = [layout.image_start + row for row in rows_of_image if row not in newlines]
        rows = _Rows(
            embeds,
            torch.arange(len(embeds), device=embeds.device),
            torch.tensor(visual, dtype=torch.int64, device=embeds.device),
            torch.arange(len(visual), device=embeds.device),
            image_segments or (layout.grid or (0, 0),),
            len(embeds),
        )
        cache = _Cache(DynamicCache(), {})
        found: list[list[int] | None] = []
        next_positions: list[int] = []
        first = rows.segments
        cuts = list(enumerate(self._chain.cuts if layout.grid else ()))
        for layer in range(BEFORE_LLM, self._model.config.decoder.num_layers):
            before = rows
            if layer != BEFORE_LLM:
                rows = replace(rows, hidden=self._run(layer, rows, cache))
                next_positions.append(rows.next_position)
            for index, cut in cuts:
                if cut.layer == layer:
                    first = rows.segments if cut.index == 0 else first
                    forced = None if kept is None else kept[index]
                    rows, ids = self._reduce(cut, first, before, rows, forced)
                    found.append(ids)
        lengths = tuple(cache.rows.get_seq_length(layer) for layer in range(len(next_positions)))
        logits = [self._logits(rows.hidden[-1:])]
        token_ids = [int(logits[0].argmax())]
        while len(token_ids) < max_new_tokens:
            logits.append(self._decode(token_ids[-1], len(token_ids) - 1, next_positions, cache))
            token_ids.append(int(logits[-1].argmax()))
        return ReducedGeneration(token_ids, torch.stack(logits), found, lengths)

    def _run(self, layer: int, rows: _Rows, cache: _Cache) -> Tensor:
        hidden, positions = rows.hidden.unsqueeze(0), rows.positions.unsqueeze(0)
        rotary = self._model.language_model.rotary_emb(hidden, position_ids=positions)
        options: dict[str, Any] = {"use_cache": True, "position_embeddings": rotary}
        keys = torch.cat((cache.positions.get(layer, rows.positions[:0]), rows.positions))
        mask = window_mask(rows.positions, keys, self._model.config.decoder.window(layer))
        out = self._model.language_model.layers[layer](hidden, mask, positions, cache.rows, **options)
        cache.positions[layer] = keys
        return cast(Tensor, out)[0]

    def _decode(self, token_id: int, step: int, next_positions: Sequence[int], cache: _Cache) -> Tensor:
        hidden = self._model.language_model.embed_tokens(torch.tensor([token_id], device=self._model.device))
        nothing = torch.empty(0, dtype=torch.int64)
        for layer, position in enumerate(next_positions):
            positions = torch.tensor([position + step], device=hidden.device)
            hidden = self._run(layer, _Rows(hidden, positions, nothing, nothing, (), 0), cache)
        return self._logits(hidden)

    def _logits(self, row: Tensor) -> Tensor:
        return cast(Tensor, self._model.lm_head(self._model.language_model.norm(row)))[0]

    def _reduce(
        self, cut: Cut, first: Segments, before: _Rows, rows: _Rows, forced: Sequence[int] | None
    ) -> tuple[_Rows, list[int] | None]:
        """Rows after one boundary, and which visual rows these are.

        Args:
            cut: of the chain.
            first: segments when the cut's step began.
            before: that entered the layer before the boundary.
            rows: that left it.
            forced: visual rows that are to stay, by their numbers at the start; None: the cut decides.
        """
        after = cut.segments_after(first, rows.segments)
        if isinstance(cut.step, Pool):
            return self._pool(cut.step, after, rows), None
        count = num_visual(after)
        if forced is not None:
            chosen = torch.tensor([rows.ids.tolist().index(row) for row in forced], dtype=torch.int64)
        elif cut.step.scores is not None:
            layer = cut.layer if cut.step.scores == "here" else cut.layer + 1
            scores = self._scores(layer, before if cut.step.scores == "here" else rows)
            order = torch.sort(scores[rows.visual], descending=True, stable=True).indices
            chosen = order[:count].sort().values
        else:
            known = cut.step.choose(0, as_grid(rows.segments), count)
            chosen = _farthest_points(rows.hidden[rows.visual], count) if known is None else torch.tensor(known).long()
        chosen = chosen.to(rows.hidden.device)
        picked = _without(len(rows.hidden), rows.visual, rows.visual[chosen])
        ids = rows.ids[chosen]
        positions = rows.positions[picked]
        if not cut.step.keeps_positions:
            positions = torch.arange(len(picked), device=chosen.device)
        end = rows.next_position if cut.step.keeps_positions else len(picked)
        visual = torch.searchsorted(picked, rows.visual[chosen])
        return _Rows(rows.hidden[picked], positions, visual, ids, after, end), ids.tolist()

    def _scores(self, layer: int, rows: _Rows) -> Tensor:
        """`[num_rows]` float32 attention of the last row in a layer, mean over the heads."""
        module: Any = self._model.language_model.layers[layer]
        x = module.input_layernorm(rows.hidden).unsqueeze(0)
        size, attention = self._model.config.decoder.head_dim, module.self_attn
        q, k = (each(x).view(1, len(x[0]), -1, size) for each in (attention.q_proj, attention.k_proj))
        if self._model.config.decoder.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = self._model.language_model.rotary_emb(x, position_ids=rows.positions.unsqueeze(0))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        weights = (q[:, :, -1:].float() @ k.float().transpose(2, 3)) * size**-0.5
        mask = window_mask(rows.positions[-1:], rows.positions, self._model.config.decoder.window(layer))
        weights = weights if mask is None else weights.masked_fill(~mask, float("-inf"))
        return cast(Tensor, weights.softmax(-1)[0, :, 0].mean(0))

    def _pool(self, step: Pool, after: Segments, rows: _Rows) -> _Rows:
        """Each grid by itself; what a window leaves takes the place of its first token."""
        hidden, firsts = rows.hidden.clone(), []
        start = 0
        for before, grid in zip(rows.segments, after, strict=True):
            numbers = rows.visual[start : start + num_visual((before,))]
            start += len(numbers)
            if grid != before:
                pool = torch.nn.functional.avg_pool2d if step.function == "avg" else torch.nn.functional.max_pool2d
                pooled = pool(rows.hidden[numbers].T.reshape(1, -1, *before).float(), step.kernel)[0].flatten(1).T
                lines = numbers.view(before)[:: step.kernel[0], :: step.kernel[1]]
                numbers = lines[: grid[0], : grid[1]].flatten()
                hidden[numbers] = pooled.to(hidden.dtype)
            firsts.append(numbers)
        stay = torch.cat(firsts)
        picked = _without(len(hidden), rows.visual, stay)
        positions = torch.arange(len(picked), device=hidden.device)
        ids = torch.arange(len(stay), device=hidden.device)
        return _Rows(hidden[picked], positions, torch.searchsorted(picked, stay), ids, after, len(picked))


def _without(num_rows: int, visual: Tensor, stay: Tensor) -> Tensor:
    """Ascending rows: all but the visual tokens that do not stay."""
    is_left = torch.ones(num_rows, dtype=torch.bool, device=visual.device)
    is_left[visual] = False
    is_left[stay] = True
    return is_left.nonzero()[:, 0]


def _farthest_points(rows: Tensor, count: int) -> Tensor:
    """DivPrune's rows, ascending: each new one is the farthest, by cosine, from its nearest among those picked."""
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    distances = 1 - unit @ unit.T
    distances.fill_diagonal_(float("inf"))
    picked: list[int] = []
    for _ in range(count):
        nearest = (distances[:, picked] if picked else distances).amin(1)
        nearest[picked] = -float("inf")
        picked.append(int(nearest.argmax()))
    return torch.tensor(sorted(picked), dtype=torch.int64)
