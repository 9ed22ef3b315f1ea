"""Computes one step: images to rows, rows through stages and boundaries, logits of the last rows."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Backend, Beginning, Decoded, NewSequences, SequenceCache, StagedPrefill
from dpn_rt.cache.block_allocator import Slots
from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.device.device import Device
from dpn_rt.engine.prefix_cache import PrefixCache
from dpn_rt.engine.scheduler import Batch
from dpn_rt.engine.sequence import Sequence
from dpn_rt.errors import CapacityError, RequestError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.layout import Layout
from dpn_rt.model.reduction.pooling import BoundaryTrace
from dpn_rt.model.reduction.pooling_config import SKIPPED, PoolingConfig
from dpn_rt.model.vision.clip import Encoder
from dpn_rt.outputs import Pyramid
from dpn_rt.prompts.visual_input import VisualInput
from dpn_rt.schema.weights import TORCH_DTYPES


class Runner:
    """The model's parts, whatever computes its rows."""

    def __init__(
        self,
        model: ModelConfig,
        backend: Backend,
        encoder: Encoder | None,
        prefix_cache: PrefixCache | None = None,
        image_cache: ImageCache | None = None,
    ) -> None:
        self._model = model
        self._boundaries = model.reduction.boundaries if isinstance(model.reduction, PoolingConfig) else ()
        self._backend = backend
        self._encoder = encoder
        self.prefix_cache = prefix_cache
        """None: prompts' beginnings are not kept."""
        self.image_cache = image_cache
        """None: images' rows are not kept."""

    @property
    def cache(self) -> SequenceCache:
        """Where keys and values are."""
        return self._backend.cache

    @property
    def queue(self) -> Device | None:
        """The device whose decode steps can be queued before their tokens are known to the host, if there is one."""
        return self._backend.queue

    def begin_prefill(self, batch: Batch) -> PrefillJob:
        """New sequences, to be computed as far as the caller likes at a time."""
        return PrefillJob(self, batch)

    def encode_images(self, pixel_values: ListOf[Tensor]) -> list[Tensor]:
        """Decoder rows `[num_visual_tokens, hidden_size]` of each image `[3, image_size, image_size]`."""
        assert self._encoder is not None
        return self._encoder.encode(pixel_values)

    def prefill(self, sequences: ListOf[Sequence], slots: Slots, beginnings: ListOf[Beginning]) -> StagedPrefill:
        """The rows of new sequences, whose images are encoded, before the first stage."""
        forced = np.asarray([sequence.forced_experts for sequence in sequences], dtype=np.int32)
        biases = np.asarray([sequence.prompt.router_bias for sequence in sequences])
        return self._backend.prefill(
            NewSequences(
                x=self._embed(sequences, beginnings),
                layout=Layout.of_prompts(sequences, [beginning.num_rows for beginning in beginnings]),
                slots=slots,
                forced_experts=forced.reshape(len(sequences), len(self._model.reduction.layers)),
                router_biases=biases,
                beginnings=beginnings,
                kept_rows=[self._rows_to_keep(*pair) for pair in zip(sequences, beginnings, strict=True)],
            )
        )

    def beginning_of(self, sequence: Sequence) -> Beginning:
        """What of a sequence is in the cache; its slot gets those KV blocks."""
        beginning = self._shared_beginning(sequence)
        if sequence.pyramid is None:
            sequence.num_cached_rows = beginning.num_rows + beginning.num_exit_rows
        return beginning

    def _shared_beginning(self, sequence: Sequence) -> Beginning:
        if self.prefix_cache is None or sequence.slot is None:
            return Beginning()
        cache = self.prefix_cache.cache
        match = self.prefix_cache.match(sequence)
        block_size = cache.config.block_size
        for block in match.blocks:
            for stage, ids in enumerate(block.blocks):
                cache.share(stage, sequence.slot, ids, block_size)
        if match.image is None:
            return Beginning(match.num_text_rows)
        num_rows = _image_end(sequence) - match.num_text_rows
        try:
            cache.share(0, sequence.slot, match.image.blocks[0], num_rows)
        except CapacityError:
            return Beginning(match.num_text_rows)  # sharing may take a block more than computing does
        return Beginning(match.num_text_rows, num_rows, match.image.exit_rows)

    def keep_beginning(self, sequence: Sequence, exit_rows: Tensor | None) -> None:
        """Keeps the beginning of a sequence that has just been prefilled for prompts to come."""
        if self.prefix_cache is not None and sequence.failure is None:
            self.prefix_cache.insert(sequence, exit_rows)

    def reuse_statistics(self) -> tuple[int, int, int, int]:
        """Rows of prompts and those of them found in the cache; images of prompts and those that skipped the tower."""
        if self.prefix_cache is None or self.image_cache is None:
            return 0, 0, 0, 0
        prefix, images = self.prefix_cache.statistics, self.image_cache
        return prefix.queried_rows, prefix.hit_rows, prefix.image_queries, prefix.image_hits + images.hits

    def _rows_to_keep(self, sequence: Sequence, beginning: Beginning) -> tuple[int, int]:
        """First and last (excluded) of the computed rows that the prefix cache wants behind stage 0."""
        if self.prefix_cache is None or sequence.image_start is None or beginning.num_exit_rows:
            return 0, 0
        block_size = self.prefix_cache.cache.config.block_size
        whole_blocks = sequence.image_start // block_size * block_size
        return whole_blocks - beginning.num_rows, _image_end(sequence) - beginning.num_rows

    def decode(self, batch: Batch, token_ids: Tensor | None = None) -> Decoded:
        """Logits behind each sequence's last token, whose room in the cache has been made (`SequenceCache.grow`).

        Args:
            token_ids: `[num_seqs]` int64, those tokens where only `queue` has them yet.
        """
        ids: npt.NDArray[np.int64] | Tensor
        if token_ids is None:
            ids = np.asarray([sequence.output_token_ids[-1] for sequence in batch.sequences], dtype=np.int64)
        else:
            ids = token_ids
        with torch.inference_mode():
            return self._backend.decode(ids, batch.slots)

    def note_routes(self, sequences: ListOf[Sequence], prefill: StagedPrefill) -> None:
        """Tells each sequence of a finished prefill how it went through the pyramid."""
        for index, sequence in enumerate(sequences):
            sequence.failure = self._misfit(index, prefill.layouts, prefill.traces)
            if sequence.pyramid is None:
                sequence.pyramid = self._pyramid_of(index, sequence, prefill)
                sequence.pin_route([int(trace.experts[index]) for trace in prefill.traces])

    def rows_of(self, images: ListOf[VisualInput]) -> list[Tensor]:
        """Decoder rows of images: given ones as they are, known ones from the cache, others from the tower."""
        rows = {image.key: self._known_rows(image) for image in images}
        new = {image.key: image.pixels for image in images if rows[image.key] is None and image.pixels is not None}
        for key, encoded in zip(new, self.encode_images(list(new.values())) if new else (), strict=True):
            rows[key] = encoded
            if self.image_cache is not None:
                self.image_cache.insert(key, encoded)
        found = [rows[image.key] for image in images]
        assert all(row is not None for row in found)
        return found  # type: ignore[return-value]

    def _known_rows(self, image: VisualInput) -> Tensor | None:
        if image.embeds is not None:
            return image.embeds.to(TORCH_DTYPES[self._model.dtype])
        return None if self.image_cache is None else self.image_cache.find(image.key)

    def _embed(self, sequences: ListOf[Sequence], beginnings: ListOf[Beginning]) -> Tensor:
        """The rows that are not in the cache. An image is there as a whole or not at all."""
        skipped = [beginning.num_rows + beginning.num_exit_rows for beginning in beginnings]
        ids = [sequence.row_token_ids()[skip:] for sequence, skip in zip(sequences, skipped, strict=True)]
        images = [
            sequence.image_rows
            for sequence, beginning in zip(sequences, beginnings, strict=True)
            if sequence.image_rows is not None and not beginning.num_exit_rows
        ]
        return self._backend.embed(np.concatenate(ids), images)

    def _misfit(self, index: int, layouts: list[Layout], traces: list[BoundaryTrace]) -> RequestError | None:
        for layout, trace, boundary in zip(layouts, traces, self._boundaries, strict=False):
            if trace.misfits[index]:
                expert, grid = int(trace.experts[index]), tuple(map(int, layout.grids[index]))
                return RequestError(
                    f"the kernel {boundary.kernels[expert]} of expert {expert} behind layer {boundary.layer} does not "
                    f"fit the grid {grid} of visual tokens: force another route or give a larger grid"
                )
        return None

    def _pyramid_of(self, index: int, sequence: Sequence, prefill: StagedPrefill) -> Pyramid:
        layouts, traces = prefill.layouts, prefill.traces
        experts = [int(trace.experts[index]) for trace in traces]
        boundaries = self._boundaries
        grids = [tuple(map(int, layout.grids[index])) for layout in layouts]
        visual = sequence.prompt.visual
        outside_grid = 0 if visual is None else visual.num_visual_tokens - visual.grid[0] * visual.grid[1]
        taken = [None if expert == SKIPPED else expert for expert in experts]
        return Pyramid(
            experts=taken,
            kernels=[None if e is None else b.kernels[e] for e, b in zip(taken, boundaries, strict=True)],
            probs=[
                None if trace.probs is None or expert is None else trace.probs[index].tolist()
                for expert, trace in zip(taken, traces, strict=True)
            ],
            visual_tokens=[int(layout.num_visual[index]) + outside_grid for layout in layouts],
            kv_lengths=[int(layout.kv_lengths[index]) for layout in layouts],
            grids=[None if height == 0 else (height, width) for height, width in grids],
        )


def _image_end(sequence: Sequence) -> int:
    visual, start = sequence.prompt.visual, sequence.image_start
    return 0 if visual is None or start is None else start + visual.num_visual_tokens


class PrefillJob:
    """New sequences from images to logits, a part at a time."""

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self._runner = runner
        self.sequences = list(batch.sequences)
        self._slots = batch.slots
        self._beginnings = [runner.beginning_of(sequence) for sequence in self.sequences]
        self._prefill: StagedPrefill | None = None

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
                self._prefill = self._runner.prefill(self.sequences, self._slots, self._beginnings)
            self._prefill.advance(None if max_work is None else max_work // self._prefill.layers)
            if self._prefill.is_done:
                self._finish(self._prefill)

    def drop(self, sequence: Sequence) -> None:
        """Goes on without a sequence that has ended."""
        index = self.sequences.index(sequence)
        del self.sequences[index], self._beginnings[index]
        self._slots = np.delete(self._slots, index)
        if self._prefill is not None:
            self._prefill.drop(index)

    def _without_rows(self) -> list[VisualInput]:
        """The images that have no rows yet and need some, each once however many sequences share it."""
        images: dict[bytes, VisualInput] = {}
        for sequence, beginning in zip(self.sequences, self._beginnings, strict=True):
            visual = sequence.prompt.visual
            if visual is not None and sequence.image_rows is None and not beginning.num_exit_rows:
                images[visual.key] = visual
        return list(images.values())

    def _encode(self, images: list[VisualInput]) -> None:
        rows = {image.key: row for image, row in zip(images, self._runner.rows_of(images), strict=True)}
        for sequence in self.sequences:
            visual = sequence.prompt.visual
            if visual is not None and sequence.image_rows is None:
                sequence.image_rows = rows.get(visual.key)

    def _finish(self, prefill: StagedPrefill) -> None:
        self._runner.note_routes(self.sequences, prefill)
        for sequence, exit_rows, beginning in zip(self.sequences, prefill.exit_rows, self._beginnings, strict=True):
            # What was found may have been given up since, and is kept anew with the rows that were found.
            self._runner.keep_beginning(sequence, beginning.exit_rows if exit_rows is None else exit_rows)
