"""What rank 0 and the other ranks say to each other over pipes, besides calls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dpn_rt.errors import DpnError, EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import MANIFEST, WEIGHTS
from dpn_rt.format.safetensors_header import read_header
from dpn_rt.schema.files import SETTINGS_BYTES, read_file
from dpn_rt.settings import EngineSettings


@dataclass(frozen=True)
class RankSource:
    """To a rank, first of all: its part of which engine."""

    path: Path
    fingerprint: str
    """Of the files that rank 0 has loaded, see `fingerprint`."""
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


def fingerprint(engine: Path) -> str:
    """sha256 of an engine's manifest, which has the sha256 of its files, and of the header of its weights.

    Raises:
        EngineError: a file cannot be read.
    """
    manifest = read_file(engine / MANIFEST, EngineError, SETTINGS_BYTES)
    header = repr(read_header(engine / WEIGHTS, EngineError))
    return hashlib.sha256(manifest + header.encode()).hexdigest()
