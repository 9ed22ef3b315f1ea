"""The engine that answers questions, in this process or in others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpn_rt.evaluate.settings import RunSettings
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.llm import LLM
from dpn_rt.model.reduction.pooling_config import PoolingConfig


@dataclass(frozen=True)
class EngineChoice:
    """The engine that answers, and how it is loaded; none of this changes an answer, but for rounding."""

    path: Path
    device: str = "auto"
    max_num_seqs: int = 64
    reuse_bytes: int = 0
    verify: bool = True
    tensor_parallel_size: int = 1
    copy_weights: bool | None = None

    def load(self, runs: Sequence[RunSettings]) -> LLM:
        """The engine, with boundaries for all reductions that runs ask for."""
        return LLM(
            self.path,
            self.device,
            max_num_seqs=self.max_num_seqs,
            reuse_bytes=self.reuse_bytes,
            tensor_parallel_size=self.tensor_parallel_size,
            copy_weights=self.copy_weights,
            verify=self.verify,
            reduce=self.reduce(runs),
        )

    def reduce(self, runs: Sequence[RunSettings]) -> list[str] | None:
        """SPECs that the engine is loaded with; None: its own."""
        specs = list(dict.fromkeys(run.reduce for run in runs if run.reduce is not None))
        # A trained model skips its boundaries on request; it is loaded with them, for the runs that do not ask.
        is_trained = isinstance(EngineDir.open(self.path, verify=False).model.reduction, PoolingConfig)
        return specs if specs and not is_trained else None
