"""How rows of a prefill go through a stage: kernel by kernel here, or as a graph (`stage_graphs.py`)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dpn_rt.backends.kernels.executor import Executor
from dpn_rt.model.stage_batch import StageBatch


class Stages(Protocol):
    """The decoder's stages, for rows of a prefill."""

    def place(self, stage: int, batch: StageBatch) -> None:
        """Is told of a batch that `run` will get, before its rows are there: `run` has less to do then.

        `batch.positions` and `batch.cache_rows` may be longer than those that `run` gets, of which they are the
        beginning.
        """

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """Rows `[num_rows, hidden_size]` through a stage, see `Stage.forward`."""


class PlainStages:
    """`Stages` without graphs."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def place(self, stage: int, batch: StageBatch) -> None:
        """Nothing needs it."""

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """See `Executor.run`."""
        return self._executor.run(stage, x, batch)
