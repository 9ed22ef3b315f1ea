"""Computes one step: images to rows, rows through stages and boundaries, logits of the last rows."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np
import torch
from torch import Tensor

from dpn_rt.config import ModelConfig
from dpn_rt.decoder import Decoder, decode_batch
from dpn_rt.errors import RequestError
from dpn_rt.kv_cache import KvCache, Slots
from dpn_rt.layout import Layout
from dpn_rt.outputs import Pyramid
from dpn_rt.prefill import Prefill
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
            if batch.kind == "decode":
                token_ids = torch.tensor([sequence.output_token_ids[-1] for sequence in batch.sequences])
                return self.decode(token_ids, batch.slots)
            job = self.begin_prefill(batch)
            while job.logits is None:
                job.advance()
            return job.logits

    def begin_prefill(self, batch: Batch) -> PrefillJob:
        """New sequences, to be computed as far as the caller likes at a time."""
        return PrefillJob(self, batch)

    def encode_images(self, pixel_values: ListOf[Tensor]) -> list[Tensor]:
        """Decoder rows `[num_visual_tokens, hidden_size]` of each image `[3, image_size, image_size]`."""
        assert self._vision is not None and self._projector is not None
        rows: list[Tensor] = []
        for first in range(0, len(pixel_values), IMAGES_PER_CALL):
            features = self._vision.forward(torch.stack(list(pixel_values[first : first + IMAGES_PER_CALL])))
            projected = self._projector.forward(features.flatten(0, 1))
            rows += projected.view(*features.shape[:2], -1).unbind(0)
        return rows

    def prefill(self, sequences: ListOf[Sequence], slots: Slots) -> Prefill:
        """The rows of new sequences, whose images are encoded, before the first stage."""
        boundaries = len(self._boundaries)
        forced = np.asarray([sequence.forced_experts for sequence in sequences], dtype=np.int32)
        biases = np.asarray([sequence.prompt.router_bias for sequence in sequences])
        return Prefill(
            self._decoder,
            self._boundaries,
            self.cache,
            self._embed(sequences),
            Layout.of_prompts(sequences),
            slots,
            forced.reshape(len(sequences), boundaries),
            biases,
        )

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

    def note_routes(self, sequences: ListOf[Sequence], prefill: Prefill) -> None:
        """Tells each sequence of a finished prefill how it went through the pyramid."""
        for index, sequence in enumerate(sequences):
            sequence.failure = self._misfit(index, prefill.layouts, prefill.traces)
            if sequence.pyramid is None:
                sequence.pyramid = self._pyramid_of(index, prefill.layouts, prefill.traces)
                sequence.pin_route([int(trace.experts[index]) for trace in prefill.traces])

    def rows_of(self, images: ListOf[VisualInput]) -> list[Tensor]:
        """Decoder rows of images, given ones as they are."""
        pixels = [image.pixels for image in images if image.pixels is not None]
        encoded = iter(self.encode_images(pixels))
        dtype = self.cache.cells.dtype
        return [next(encoded) if image.embeds is None else image.embeds.to(dtype) for image in images]

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


class PrefillJob:
    """New sequences from images to logits, a part at a time."""

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self._runner = runner
        self.sequences = list(batch.sequences)
        self._slots = batch.slots
        self._prefill: Prefill | None = None

    @property
    def logits(self) -> Tensor | None:
        """`[num_seqs, vocab_size]`, when done."""
        return None if self._prefill is None else self._prefill.logits

    def advance(self, max_work: int | None = None) -> None:
        """Encodes images or computes a chunk of rows.

        Args:
            max_work: rows times layers, at most, and one image; None: all images, or all rows of the stage.
        """
        with torch.inference_mode():
            waiting = self._without_rows()
            if waiting:
                self._encode(waiting if max_work is None else waiting[:1])
                return
            if self._prefill is None:
                self._prefill = self._runner.prefill(self.sequences, self._slots)
            self._prefill.advance(None if max_work is None else max_work // self._prefill.layers)
            if self._prefill.is_done:
                self._runner.note_routes(self.sequences, self._prefill)

    def drop(self, sequence: Sequence) -> None:
        """Goes on without a sequence that has ended."""
        index = self.sequences.index(sequence)
        del self.sequences[index]
        self._slots = np.delete(self._slots, index)
        if self._prefill is not None:
            self._prefill.drop(index)

    def _without_rows(self) -> list[VisualInput]:
        """The images that have no rows yet, each once however many sequences share it."""
        missing = [s.prompt.visual for s in self.sequences if s.image_rows is None and s.prompt.visual is not None]
        return list({id(visual): visual for visual in missing}.values())

    def _encode(self, images: list[VisualInput]) -> None:
        rows = self._runner.rows_of(images)
        for sequence in self.sequences:
            for visual, encoded in zip(images, rows, strict=True):
                if sequence.prompt.visual is visual and sequence.image_rows is None:
                    sequence.image_rows = encoded
