"""Computes one step: images to rows, rows through stages and boundaries, logits of the last rows."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np
import torch
from torch import Tensor

from dpn_rt.config import ModelConfig
from dpn_rt.decoder import Decoder, decode_batch, prefill_batch
from dpn_rt.errors import RequestError
from dpn_rt.kv_cache import KvCache, Slots
from dpn_rt.layout import Layout
from dpn_rt.outputs import Pyramid
from dpn_rt.pyramid import SKIPPED, Boundary, BoundaryTrace
from dpn_rt.scheduler import Batch
from dpn_rt.sequence import VISUAL_ROW, Sequence
from dpn_rt.vision import Projector, VisionTower
from dpn_rt.visual_input import VisualInput

IMAGES_PER_CALL = 4
"""Images that go through the tower together: enough rows for full speed, few enough to stay in the caches."""


class Runner:
    """The model's parts, and the KV cache that they fill."""

    def __init__(
        self,
        model: ModelConfig,
        decoder: Decoder,
        boundaries: list[Boundary],
        vision: VisionTower | None,
        projector: Projector | None,
        cache: KvCache,
    ) -> None:
        self._model = model
        self._decoder = decoder
        self._boundaries = boundaries
        self._vision = vision
        self._projector = projector
        self.cache = cache

    def run(self, batch: Batch) -> Tensor:
        """Logits `[num_seqs, vocab_size]` for the next token of each sequence of the batch."""
        with torch.inference_mode():
            if batch.kind == "prefill":
                return self._prefill_sequences(batch)
            token_ids = torch.tensor([sequence.output_token_ids[-1] for sequence in batch.sequences])
            return self.decode(token_ids, batch.slots)

    def encode_images(self, pixel_values: ListOf[Tensor]) -> list[Tensor]:
        """Decoder rows `[num_visual_tokens, hidden_size]` of each image `[3, image_size, image_size]`."""
        assert self._vision is not None and self._projector is not None
        rows: list[Tensor] = []
        for first in range(0, len(pixel_values), IMAGES_PER_CALL):
            features = self._vision.forward(torch.stack(list(pixel_values[first : first + IMAGES_PER_CALL])))
            projected = self._projector.forward(features.flatten(0, 1))
            rows += projected.view(*features.shape[:2], -1).unbind(0)
        return rows

    def prefill(
        self,
        x: Tensor,
        layout: Layout,
        slots: Slots,
        forced_experts: list[list[int]],
        router_biases: list[float] | None = None,
    ) -> tuple[Tensor, list[Layout], list[BoundaryTrace]]:
        """All rows of new sequences through every stage and boundary.

        Args:
            x: `[num_rows, hidden_size]` embeddings; overwritten.
            layout: of `x`.
            slots: `[num_seqs]` empty slots in the KV cache; filled.
            forced_experts: per sequence and boundary, -1 where the router decides.
            router_biases: per sequence; None for none.

        Returns:
            Logits `[num_seqs, vocab_size]`, the layout of each stage, the trace of each boundary.
        """
        forced = np.asarray(forced_experts, dtype=np.int32).reshape(layout.num_seqs, len(self._boundaries))
        biases = None if router_biases is None else np.asarray(router_biases, dtype=np.float64)
        layouts, traces = [layout], []
        for index, stage in enumerate(self._decoder.stages):
            self.cache.fill_stage(index, slots, layout.lengths)
            batch = prefill_batch(
                torch.from_numpy(layout.lengths),
                torch.from_numpy(layout.positions),
                self.cache.block_tables(index, slots),
                torch.from_numpy(layout.cu_seqlens),
                torch.from_numpy(layout.last_rows),
            )
            x = stage.forward(x, batch, self.cache.cells)
            if index < len(self._boundaries):
                x, layout, trace = self._boundaries[index].apply(x, layout, forced[:, index], biases)
                layouts.append(layout)
                traces.append(trace)
        return self._decoder.logits(x), layouts, traces

    def decode(self, token_ids: Tensor, slots: Slots) -> Tensor:
        """One new row for each sequence, whose room in the cache has been made (`KvCache.grow`).

        Args:
            token_ids: `[num_seqs]` int64, the last token of each sequence.
            slots: `[num_seqs]` slots in the KV cache.

        Returns:
            Logits `[num_seqs, vocab_size]`.
        """
        lengths = torch.from_numpy(np.ascontiguousarray(self.cache.lengths(slots).T))
        cu_seqlens = torch.arange(len(slots) + 1, dtype=torch.int32)
        x = self._decoder.embed(token_ids)
        for index, stage in enumerate(self._decoder.stages):
            batch = decode_batch(lengths[index], self.cache.block_tables(index, slots), cu_seqlens)
            x = stage.forward(x, batch, self.cache.cells)
        return self._decoder.logits(x)

    def _prefill_sequences(self, batch: Batch) -> Tensor:
        self._encode_new_images(batch.sequences)
        layout = Layout.of_prompts(batch.sequences)
        x = self._embed(batch.sequences)
        logits, layouts, traces = self.prefill(
            x,
            layout,
            batch.slots,
            [sequence.forced_experts for sequence in batch.sequences],
            [sequence.prompt.router_bias for sequence in batch.sequences],
        )
        for index, sequence in enumerate(batch.sequences):
            sequence.failure = self._misfit(index, layouts, traces)
            if sequence.pyramid is None:
                sequence.pyramid = self._pyramid_of(index, layouts, traces)
                sequence.pin_route([int(trace.experts[index]) for trace in traces])
        return logits

    def _encode_new_images(self, sequences: ListOf[Sequence]) -> None:
        """Image rows of the sequences that have none yet; an image that several share goes through the tower once."""
        new = [sequence for sequence in sequences if sequence.image_rows is None and sequence.prompt.visual is not None]
        images = {id(visual): visual.pixels for visual in (_visual(sequence) for sequence in new)}
        pixels = {key: values for key, values in images.items() if values is not None}
        encoded = dict(zip(pixels, self.encode_images(list(pixels.values())), strict=True)) if pixels else {}
        for sequence in new:
            visual = _visual(sequence)
            given = visual.embeds
            sequence.image_rows = encoded[id(visual)] if given is None else given.to(self.cache.cells.dtype)

    def _embed(self, sequences: ListOf[Sequence]) -> Tensor:
        token_ids = torch.from_numpy(np.concatenate([sequence.row_token_ids() for sequence in sequences]))
        visual = token_ids == VISUAL_ROW
        x = self._decoder.embed(token_ids.clamp_min(0))
        if visual.any():
            rows = [sequence.image_rows for sequence in sequences if sequence.image_rows is not None]
            x[visual] = torch.cat(rows)
        return x

    def _misfit(self, index: int, layouts: list[Layout], traces: list[BoundaryTrace]) -> RequestError | None:
        for layout, trace, boundary in zip(layouts, traces, self._model.pyramid.boundaries, strict=False):
            if trace.misfits[index]:
                expert, grid = int(trace.experts[index]), tuple(map(int, layout.grids[index]))
                return RequestError(
                    f"the kernel {boundary.kernels[expert]} of expert {expert} behind layer {boundary.layer} does not "
                    f"fit the grid {grid} of visual tokens: force another route or give a larger grid"
                )
        return None

    def _pyramid_of(self, index: int, layouts: list[Layout], traces: list[BoundaryTrace]) -> Pyramid:
        experts = [int(trace.experts[index]) for trace in traces]
        boundaries = self._model.pyramid.boundaries
        grids = [tuple(map(int, layout.grids[index])) for layout in layouts]
        taken = [None if expert == SKIPPED else expert for expert in experts]
        return Pyramid(
            experts=taken,
            kernels=[None if e is None else b.kernels[e] for e, b in zip(taken, boundaries, strict=True)],
            probs=[
                None if trace.probs is None or expert is None else trace.probs[index].tolist()
                for expert, trace in zip(taken, traces, strict=True)
            ],
            visual_tokens=[int(layout.num_visual[index]) for layout in layouts],
            kv_lengths=[int(layout.lengths[index]) for layout in layouts],
            grids=[None if height == 0 else (height, width) for height, width in grids],
        )


def _visual(sequence: Sequence) -> VisualInput:
    visual = sequence.prompt.visual
    assert visual is not None
    return visual
