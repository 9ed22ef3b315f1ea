"""New sequences on their way from images to logits, some rows at a time.

A stage is computed in chunks of as many rows as the caller likes, so that other sequences can decode in between; what a
chunk needs of the rows before it is in the cache. The rows of a stage cross the boundary together.

While a boundary is under way on a device, the next stage is prepared for as many rows as there may be. When the host is
told how many there are, they can be queued at once; the host makes its own layout, and gives back room, after that.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpn_rt.backends.backend import Backend, PreparedStage, StageRun
from dpn_rt.engine.images import ImageRows
from dpn_rt.engine.prefix_cache import CachedPrefix, PrefixCache
from dpn_rt.engine.pyramids import pyramid_of
from dpn_rt.engine.scheduler import Batch
from dpn_rt.engine.sequence import Sequence
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.reducer import BoundaryTrace, NothingReduced, Reduced, StageOutput, forced_experts
from dpn_rt.model.vision.visual_input import VisualInput


@dataclass(frozen=True, eq=False)
class Crossing:
    """A boundary under way: the host does not know the rows after it yet."""

    reduced: Reduced
    prepared: PreparedStage | None
    """The stage after it; None where it was not prepared."""


class Prefill:
    """One batch of new sequences. `advance` until `logits` are there."""

    def __init__(self, batch: Batch, backend: Backend, images: ImageRows, prefixes: PrefixCache | None) -> None:
        self._backend, self._images, self._prefixes = backend, images, prefixes
        self.sequences = list(batch.sequences)
        self.logits: Tensor | None = None
        """`[num_seqs, vocab_size]`, when done."""
        self._slots = batch.slots
        self._cached = [CachedPrefix() if prefixes is None else prefixes.share(each) for each in self.sequences]
        for sequence, prefix in zip(self.sequences, self._cached, strict=True):
            if sequence.pyramid is None:
                sequence.num_cached_rows = prefix.num_rows + prefix.num_stage_0_rows
        self._layouts = [Layout.of_prompts(self.sequences, [prefix.num_rows for prefix in self._cached])]
        """Of each stage so far."""
        self._traces: list[BoundaryTrace] = []
        """Of each boundary so far."""
        # An image that is cached in stage 0 is computed from stage 1 on.
        cached_in_stage_0 = np.array([prefix.num_stage_0_rows for prefix in self._cached], dtype=np.int32)
        self._layout = self._layouts[0].skip_prefix(cached_in_stage_0)
        """Of the rows that the present stage computes."""
        self._stage, self._row = 0, 0  # the present stage, and its first row that has not been computed
        self._x: Tensor | None = None  # the rows of the present stage
        self._keys: Tensor | None = None  # of its first layer, where the boundary before it has computed them
        self._crossing: Crossing | None = None  # the boundary before it
        self._prepared: PreparedStage | None = None  # what was prepared for it
        self._has_room = False  # for its rows, in the cache
        self._stage_0_rows: list[tuple[Tensor, ...]] = [()] * len(self.sequences)  # to keep, of each image
        self._ended: list[Tensor] = []  # what the last stage gave
        self._queries: list[
            Tensor
        ] = []  # of the sequences that have ended in the present stage, if a boundary reads them

    def advance(self, max_work: int | None = None) -> None:
        """Encodes images, or computes a chunk of rows.

        Args:
            max_work: rows times layers, at most, and one image; None: all images, or all rows of the stage.
        """
        with torch.inference_mode():
            if images := self._images_without_rows():
                self._encode(images if max_work is None else images[:1])
                return
            if self._x is None:
                self._x = self._embed()
                self._layouts[0] = self._layouts[0].with_newline_rows(self._newline_rows())
            self._run(None if max_work is None else max(1, max_work // self._backend.stage_sizes[self._stage]))
            if self._crossing is None and self._row == self._layout.num_rows:
                self._end_stage()

    def drop(self, sequence: Sequence) -> None:
        """Goes on without a sequence that has ended, whose room in the cache may be given to others now."""
        index = self.sequences.index(sequence)
        if self._crossing is not None:
            self._adopt_layout(self._crossing)
        self._prepared = self._keys = None
        start, end = map(int, self._layout.cu_seqlens[index : index + 2])
        if end <= self._row:  # it has gone through the stage
            self._ended = _without(self._ended, index)
            self._queries = _without(self._queries, index)
        if self._x is not None:
            self._x = torch.cat((self._x[:start], self._x[end:]))
        self._row -= min(max(self._row - start, 0), end - start)
        kept = np.delete(np.arange(len(self.sequences)), index)
        for each in (self.sequences, self._cached, self._stage_0_rows):
            del each[index]
        self._slots = self._slots[kept]
        self._layout = self._layout.select(kept)
        self._layouts = [layout.select(kept) for layout in self._layouts]
        self._traces = [trace.select(kept) for trace in self._traces]

    # Images

    def _images_without_rows(self) -> list[VisualInput]:
        """The images that have no rows yet and need some, each once however many sequences share it."""
        images: dict[Hashable, VisualInput] = {}
        for sequence, prefix in zip(self.sequences, self._cached, strict=True):
            for image in sequence.prompt.images[prefix.num_images :]:
                if image.handle not in sequence.image_rows:
                    images[image.handle] = image
        return list(images.values())

    def _encode(self, images: list[VisualInput]) -> None:
        rows = {image.handle: row for image, row in zip(images, self._images.encode(images), strict=True)}
        for sequence in self.sequences:
            own = {image.handle: rows[image.handle] for image in sequence.prompt.images if image.handle in rows}
            sequence.image_rows = {**own, **sequence.image_rows}

    def _embed(self) -> Tensor:
        """The rows that stage 0 computes. An image is cached as a whole or not at all."""
        ids, images = [], []
        for sequence, prefix in zip(self.sequences, self._cached, strict=True):
            ids.append(sequence.row_token_ids()[prefix.num_rows + prefix.num_stage_0_rows :])
            images += [sequence.image_rows[image.handle].rows for image in sequence.prompt.images[prefix.num_images :]]
        return self._backend.embed(np.concatenate(ids), images)

    def _newline_rows(self) -> list[IntArray]:
        """Of each image of the first layout, once it is known which of its rows the decoder sees."""
        return [
            image.newline_rows(kept)
            for index, sequence in enumerate(self.sequences)
            if sequence.image_starts
            for image, kept in zip(sequence.prompt.images, self._kept_before_llm(index), strict=True)
        ]

    # Stages

    @property
    def _is_last_stage(self) -> bool:
        return self._stage == len(self._backend.stage_sizes) - 1

    @property
    def _rows(self) -> Tensor:
        assert self._x is not None, "rows are embedded before a stage begins"
        return self._x

    def _run(self, max_rows: int | None) -> None:
        """The next rows through their stage: all of a prepared one, else a chunk of `max_rows`."""
        if self._crossing is not None:
            prepared, num_rows = self._crossing.prepared, self._crossing.reduced.num_rows
            if prepared is not None and (max_rows is None or num_rows <= max_rows):
                self._take_output(prepared.run(self._rows[:num_rows]))
                self._adopt_layout(self._crossing)
                self._row = num_rows
                return
            self._adopt_layout(self._crossing)
        if not self._has_room:
            layout = self._layout
            self._backend.cache.fill_stage(self._stage, self._slots, layout.kv_lengths, layout.next_positions)
            self._has_room = True
        num_rows = self._layout.num_rows
        end = num_rows if max_rows is None else min(num_rows, self._row + max_rows)
        if self._row < end:  # else the sequence that the stage waited for was dropped
            chunk = self._layout.chunk(self._row, end)
            rows, keys = self._rows[self._row : end], None if self._keys is None else self._keys[self._row : end]
            self._take_output(self._backend.run(self._stage, rows, keys, chunk, self._slots[chunk.sequences]))
            self._row = end

    def _take_output(self, output: StageRun) -> None:
        """Earlier stages compute in place; the last one gives the sequences that end."""
        if self._is_last_stage:
            self._ended.append(output.rows)
        elif output.queries is not None:
            self._queries.append(output.queries)

    def _end_stage(self) -> None:
        if self._is_last_stage:
            self._finish()
            return
        if self._stage == 0:
            self._join_cached_rows()
        self._cross_boundary()

    def _join_cached_rows(self) -> None:
        """From stage 1 on, the rows that stage 0 found in the cache are computed like the others."""
        parts = list(torch.split(self._rows, self._layout.lengths.tolist()))
        for index, (sequence, prefix) in enumerate(zip(self.sequences, self._cached, strict=True)):
            if self._prefixes is not None:
                new = (parts[index][start:end].clone() for start, end in self._prefixes.rows_to_keep(sequence, prefix))
                self._stage_0_rows[index] = (*prefix.stage_0_rows, *new)
            if prefix.stage_0_rows:
                parts[index] = torch.cat((*prefix.stage_0_rows, parts[index]))
        if any(prefix.stage_0_rows for prefix in self._cached):
            self._x = torch.cat(parts)

    # Boundaries

    def _cross_boundary(self) -> None:
        """The rows of the stage that has ended become those of the next one."""
        layout, reducer = self._layouts[-1], self._backend.reducers[self._stage]
        inputs = None if self._prepared is None else self._prepared.device_inputs
        choices = self._choices(self._stage)
        queries = torch.cat(self._queries) if self._queries else None
        scores = self._backend.scores(self._stage, queries, self._slots)
        biases = np.asarray([sequence.prompt.router_bias for sequence in self.sequences])
        reduced = reducer.reduce(StageOutput(self._rows, layout, choices, biases, inputs, scores))
        self._stage, self._row = self._stage + 1, 0
        self._has_room, self._prepared, self._queries = False, None, []
        self._keys = None if reduced is None else reduced.next_keys
        if reduced is None:
            self._layout = layout
            self._layouts.append(layout)
            self._traces.append(NothingReduced.of(layout))
            return
        self._x = reduced.rows  # the rows of the stage that has ended are let go
        prepared, preparer = None, self._backend.preparer
        if preparer is not None:
            most_rows = reducer.most_rows(layout, choices)
            next_choices = choices if self._is_last_stage else self._choices(self._stage)
            prepared = preparer.prepare(self._stage, reduced, most_rows, self._slots, forced_experts(next_choices))
        self._has_room = prepared is not None
        self._crossing = Crossing(reduced, prepared)

    def _adopt_layout(self, crossing: Crossing) -> None:
        """Takes up what the boundary did, on the host."""
        self._x = self._rows[: crossing.reduced.num_rows]
        self._layout, trace = crossing.reduced.finish()
        self._layouts.append(self._layout)
        self._traces.append(trace)
        if crossing.prepared is not None:
            crossing.prepared.trim(self._layout.kv_lengths, self._layout.next_positions)
        self._crossing, self._prepared = None, crossing.prepared

    def _choices(self, boundary: int) -> list[Choice]:
        return [sequence.choices[boundary] for sequence in self.sequences]

    # The end

    def _finish(self) -> None:
        self.logits = self._backend.logits(torch.cat(self._ended))
        self._x = None
        for index, sequence in enumerate(self.sequences):
            self._note_outcome(index, sequence)
            # What was found in the cache may have been given up since: it is kept anew.
            if self._prefixes is not None and sequence.failure is None:
                self._prefixes.insert(sequence, self._stage_0_rows[index], self._kept_before_llm(index))

    def _note_outcome(self, index: int, sequence: Sequence) -> None:
        """Tells a sequence what the boundaries did with it; a later prefill does the same."""
        outcomes = [trace.outcome(index) for trace in self._traces]
        sequence.failure = next((outcome.failure for outcome in outcomes if outcome.failure is not None), None)
        if sequence.pyramid is None:
            kept = self._kept_before_llm(index)
            sequence.pyramid = pyramid_of(index, sequence.prompt, self._layouts, outcomes, kept)
            sequence.choices = [outcome.choice for outcome in outcomes]

    def _kept_before_llm(self, index: int) -> list[IntArray | None]:
        """Of each image of a sequence, see `ImageResult`."""
        prefix, sequence = self._cached[index], self.sequences[index]
        encoded = sequence.prompt.images[prefix.num_images :]
        return [*prefix.kept, *(sequence.image_rows[image.handle].kept for image in encoded)]


def _without(parts: list[Tensor], index: int) -> list[Tensor]:
    """Tensors of consecutive sequences, without one sequence."""
    if not parts:
        return parts
    joined = torch.cat(parts)
    return [torch.cat((joined[:index], joined[index + 1 :]))]
