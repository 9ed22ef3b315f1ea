"""What rank 0 and the other ranks say to each other over pipes, besides calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpn_rt.errors import DpnError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.settings import EngineSettings


@dataclass(frozen=True)
class RankSource:
    """To a rank, first of all: its part of which engine."""

    engine: EngineDir
    """As rank 0 has opened it."""
    model: ModelConfig
    """With the reductions that were asked for."""
    settings: EngineSettings
    device: str
    """cpu, or cuda: then the GPU with the number of the rank."""
    rank: int
    store: Path
    """Where the ranks find each other."""
    num_threads: int
    prepack: bool


@dataclass(frozen=True)
class RankLoaded:
    """From a rank, once its weights are loaded, or cannot be."""

    error: DpnError | None = None


@dataclass(frozen=True)
class AllLoaded:
    """To a rank, once all have loaded their weights: now they wait for each other for a short time alone."""


@dataclass(frozen=True)
class PoolSize:
    """To a rank, once all are connected."""

    num_blocks: int


@dataclass(frozen=True)
class RankFailed:
    """From a rank, as its last message."""

    reason: str
    time: float
    """Of the failure, by `time.monotonic`, which all processes of a machine share."""
