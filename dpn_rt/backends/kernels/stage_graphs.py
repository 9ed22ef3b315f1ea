"""A prefill's stages as graphs: the host launches one graph for all layers of a stage.

A stage of few rows takes the host longer to launch than the device to compute. A graph is made for each stage, each
kind of attention, and buckets of rows and sequences. Rows fill a bucket from its beginning. Behind the last sequence,
attention and cache are left alone; products and norms compute rows that are not read. In small buckets the device waits
for weights, so that these rows cost nothing; larger ones are at most `MOST_PADDING` times the rows that need them. All
graphs read the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.backends.kernels.executor import Executor
from dpn_rt.cache.block_allocator import BlockAllocator
from dpn_rt.device.device import Device, Graph
from dpn_rt.model.stage_batch import StageBatch

WEIGHT_BOUND_ROWS = 128
"""Up to so many rows a product should take the time of reading its weights: by its data sheet an A100 has 150 bfloat16
FLOPs a byte of memory, an H100 about 300. Not measured."""
MOST_PADDING = 1.25
"""Rows of a bucket over the rows that take it, above `WEIGHT_BOUND_ROWS`."""


@dataclass(frozen=True, eq=False)
class StageInputs:
    """What all graphs read: the beginning of each of these. Shapes as of `StageBatch` for the largest bucket."""

    rows: Tensor
    """`[max_rows, hidden_size]`, overwritten by a stage."""
    cu_seqlens: Tensor
    positions: Tensor
    cache_rows: Tensor
    context_lens: Tensor
    block_tables: Tensor
    """`[most groups of a stage, max_seqs, max_blocks]` int32."""
    ends: Tensor
    """`[2, max_seqs]` int64 `last_rows` and `last_seqs`; 0 behind the last."""
    queries_out: Tensor
    all_seqs: Tensor
    """`[max_seqs]` int64 numbers from 0; a constant."""
    one_row_each: Tensor
    """`[max_seqs]` int32 of 1; a constant. The kernels know no empty context, nor one whose blocks are another's."""

    @classmethod
    def empty(cls, executor: Executor, cache: BlockAllocator, max_rows: int, device: torch.device) -> StageInputs:
        """No rows of no sequence."""
        config = cache.config
        max_seqs, width = config.max_num_seqs, cache.all_tables.shape[2]
        heads, head_dim = executor.decoder.query_shape
        row = executor.embed(torch.zeros(1, dtype=torch.int64, device=device))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            rows=row.new_zeros(max_rows, row.shape[1]),
            cu_seqlens=zeros(max_seqs + 1),
            positions=zeros(max_rows),
            cache_rows=zeros(max_rows),
            context_lens=zeros(max_seqs) + 1,
            block_tables=zeros(max(config.layer_groups), max_seqs, width) + cache.padding_block,
            ends=torch.zeros(2, max_seqs, dtype=torch.int64, device=device),
            queries_out=row.new_zeros(max_seqs, heads, head_dim),
            all_seqs=torch.arange(max_seqs, device=device),
            one_row_each=zeros(max_seqs) + 1,
        )

    def batch(self, bucket: Bucket, groups: int, *, reads_queries: bool) -> StageBatch:
        """The batch that a bucket's graph computes."""
        num_rows, num_seqs = bucket.num_rows, bucket.num_seqs
        return StageBatch(
            cu_seqlens=self.cu_seqlens[: num_seqs + 1],
            positions=self.positions[:num_rows],
            cache_rows=self.cache_rows[:num_rows],
            context_lens=self.context_lens[:num_seqs],
            block_tables=self.block_tables[:groups, :num_seqs],
            last_rows=self.ends[0, :num_seqs],
            last_seqs=self.ends[1, :num_seqs],
            queries_out=self.queries_out[:num_seqs] if reads_queries else None,
            extends=bucket.extends,
        )

    def fill(self, batch: StageBatch) -> None:
        """Copies where the rows of a batch stand, on the device. Sequences behind the last have no rows."""
        assert batch.last_rows is not None, "a prefill tells which rows are last"
        num_seqs, (groups, _, width) = len(batch.context_lens), batch.block_tables.shape
        num_rows, num_ends = min(len(batch.positions), len(self.positions)), len(batch.last_rows)
        last_seqs = self.all_seqs[:num_ends] if batch.last_seqs is None else batch.last_seqs
        targets = (
            self.cu_seqlens[: num_seqs + 1],
            self.context_lens[:num_seqs],
            self.context_lens[num_seqs:],
            self.positions[:num_rows],
            self.cache_rows[:num_rows],
        )
        sources = (
            batch.cu_seqlens,
            batch.context_lens,
            self.one_row_each[num_seqs:],
            batch.positions[:num_rows],
            batch.cache_rows[:num_rows],
        )
        torch._foreach_copy_(targets, sources)
        self.cu_seqlens[num_seqs + 1 :].copy_(batch.cu_seqlens[num_seqs:])
        self.block_tables[:groups, :num_seqs, :width].copy_(batch.block_tables)
        self.ends.zero_()
        torch._foreach_copy_((self.ends[0, :num_ends], self.ends[1, :num_ends]), (batch.last_rows, last_seqs))


@dataclass(frozen=True)
class Bucket:
    """What a graph was made for."""

    stage: int
    num_rows: int
    num_seqs: int
    extends: bool
    """See `StageBatch.extends`."""


class StageGraphs:
    """`Stages` with graphs, for batches that fit into a bucket; others go through the stage kernel by kernel."""

    def __init__(
        self,
        executor: Executor,
        cache: BlockAllocator,
        device: Device,
        max_rows: int,
        stages_with_queries: Set[int],
    ) -> None:
        """Records a graph for every bucket. The largest comes first, so that the others fit in its memory.

        Args:
            executor: of this process; no layer has a window, whose keys are found for all rows, none left out.
            cache: that says which KV blocks the rows have.
            device: that records.
            max_rows: of the largest bucket.
            stages_with_queries: stages after which a reducer reads `StageBatch.queries_out`.
        """
        self._executor, self._cache = executor, cache
        self._with_queries = stages_with_queries
        self._num_stages = len(executor.decoder.stages)
        self._row_buckets = list(row_buckets(max_rows))
        self._seq_buckets = list(seq_buckets(cache.config.max_num_seqs))
        self._inputs = StageInputs.empty(executor, cache, max_rows, device.torch_device)
        self._placed: Tensor | None = None  # `cu_seqlens` of the batch that the inputs have
        self._graphs = {bucket: self._record(bucket, device) for bucket in self._buckets()}

    def place(self, stage: int, batch: StageBatch) -> None:
        """See `Stages`."""
        del stage  # the inputs are those of any stage
        self._inputs.fill(batch)
        self._placed = batch.cu_seqlens

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """See `Stages`."""
        num_rows = x.shape[0]
        graph = self._graph_for(stage, num_rows, batch)
        if graph is None:
            return self._executor.run(stage, x, batch)
        if self._placed is not batch.cu_seqlens:
            self.place(stage, batch)
        rows = self._inputs.rows[:num_rows]
        rows.copy_(x)
        graph.replay()
        if batch.queries_out is not None:
            batch.queries_out.copy_(self._inputs.queries_out[: len(batch.queries_out)])
        if stage < self._num_stages - 1:
            return x.copy_(rows)
        assert batch.last_rows is not None, "a prefill tells which rows are last"
        return graph.outputs[0][: len(batch.last_rows)].clone()

    def _graph_for(self, stage: int, num_rows: int, batch: StageBatch) -> Graph | None:
        """The graph of the smallest bucket that the batch fits into; None where there is none."""
        num_seqs = len(batch.context_lens)
        rows = next((size for size in self._row_buckets if size >= num_rows), None)
        seqs = next((size for size in self._seq_buckets if size >= num_seqs), None)
        if rows is None or seqs is None or batch.keys is not None:
            return None
        return self._graphs.get(Bucket(stage, rows, seqs, batch.extends))

    def _buckets(self) -> Iterator[Bucket]:
        """From large to small. As many sequences have as many rows at least."""
        for rows in reversed(self._row_buckets):
            for fewer, seqs in zip((0, *self._seq_buckets), self._seq_buckets, strict=False):
                if fewer < rows:
                    for stage in range(self._num_stages):
                        for extends in (False, True):
                            yield Bucket(stage, rows, seqs, extends)

    def _record(self, bucket: Bucket, device: Device) -> Graph:
        reads_queries = bucket.stage in self._with_queries
        groups = self._cache.config.layer_groups[bucket.stage]
        batch = self._inputs.batch(bucket, groups, reads_queries=reads_queries)
        rows = self._inputs.rows[: bucket.num_rows]
        return device.record(lambda: (self._executor.run(bucket.stage, rows, batch),))


def row_buckets(max_rows: int) -> Iterator[int]:
    """Numbers of rows to record: powers of 2 from 16, with three between two of them above `WEIGHT_BOUND_ROWS`."""
    size = min(16, max_rows)
    while 0 < size < max_rows:
        yield size
        size += size if size < WEIGHT_BOUND_ROWS else 2 ** (size.bit_length() - 3)
    if max_rows:
        yield max_rows


def seq_buckets(max_num_seqs: int) -> Iterator[int]:
    """Numbers of sequences to record: 1, 4, 16, 64, ... below `max_num_seqs`, and `max_num_seqs`. Those without rows
    cost next to nothing."""
    size = 1
    while size < max_num_seqs:
        yield size
        size *= 4
    yield max_num_seqs
