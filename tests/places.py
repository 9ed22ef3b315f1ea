"""The runtime for GPUs. Without a GPU it runs on the host: the same classes, buffers and steps, with CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpn_rt import LLM
from dpn_rt.device.device import Graph, Step
from dpn_rt.device.host import HostDevice, HostReadback
from dpn_rt.device.packing import Array
from dpn_rt.engine import loader
from dpn_rt.format.config import ModelConfig
from dpn_rt.schema.dtypes import DType
from tests.skips import NO_GPU

HAS_GPU = torch.cuda.is_available()
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason=NO_GPU)]
PLACES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]


class CountingDevice(HostDevice):
    """The host as an asynchronous device: after a transfer, the staging memory is overwritten."""

    is_async = True

    def __init__(self) -> None:
        self.uploads = self.readings = self.recordings = 0
        self._staged: list[Tensor] = []

    def staging(self, num_bytes: int) -> Tensor:
        self.uploads += 1
        for block in self._staged:
            block.numpy()[...] = 0x7F  # code that still reads the host's copy gets nonsense
        self._staged = [super().staging(num_bytes)]
        return self._staged[0]

    def upload(self, *arrays: Array) -> list[Tensor]:
        return [tensor.clone() for tensor in super().upload(*arrays)]

    def read(self, tensor: Tensor) -> HostReadback:
        self.readings += 1
        return HostReadback(tensor.clone())

    def record(self, step: Step) -> Graph:
        self.recordings += 1
        return super().record(step)


@dataclass(frozen=True)
class Place:
    """The place where a test runs: a GPU, or the host instead of one."""

    name: str
    load: Callable[..., LLM]
    """`LLM` with the runtime for GPUs."""
    device: CountingDevice | None
    """The device that replaces the GPU; None for a GPU."""

    @property
    def dtype(self) -> DType:
        return "float32" if self.device is not None else "bfloat16"

    @property
    def tolerance(self) -> float:
        """Largest difference of log-probabilities between batches: on a GPU their size changes the order of sums."""
        return 1e-4 if self.device is not None else 0.1


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    def load(path: Path, **options: Any) -> LLM:
        # Each graph is recorded by running it, so fewer of them are made.
        return LLM(path, device="cuda", **{"max_num_seqs": 6, "max_graph_rows": 64, **options})

    if request.param == "cuda":
        return Place("cuda", load, None)
    device = CountingDevice()

    def open_host(model: ModelConfig) -> HostDevice:
        return device

    monkeypatch.setattr(loader, "open_cuda", open_host)
    return Place("cpu", load, device)
