"""Tensors between the ranks of one engine, by torch.distributed: gloo on CPUs, NCCL on GPUs (which has not been run).

The group is no global one of torch, so a program may use those as it likes, and may hold several engines.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS_TO_MEET = 120
"""For a rank to come to where the others wait, once all have loaded: all have the same work."""
LOOPBACK = "127.0.0.1"
"""All ranks are on one machine."""


class ProcessRankGroup:
    """A `RankGroup` of processes, to be connected before it is used."""

    def __init__(self, rank: int, size: int) -> None:
        """
        Args:
            rank: of this process.
            size: number of ranks.
        """
        self.rank, self.size = rank, size
        self._group: Any = None

    def connect(self, store: Path, device: torch.device) -> None:
        """Waits for all ranks.

        Args:
            store: a file that does not exist yet, in a directory that only this user may read.
            device: of all tensors.

        Raises:
            RuntimeError: a rank did not come in time.
        """
        open_group = _open_nccl if device.type == "cuda" else _open_gloo
        store_file = dist.FileStore(str(store), self.size)  # type: ignore[attr-defined]
        self._group = open_group(store_file, self.rank, self.size)

    def sum(self, x: Tensor) -> Tensor:
        """See `RankGroup`. With gloo and NCCL alike one rank adds a piece of `x`, and the others get its bits."""
        self._group.allreduce([x]).wait()
        return x

    def join(self, x: Tensor) -> Tensor:
        """See `RankGroup`."""
        parts = x.new_empty(self.size, *x.shape)
        self._group.allgather([list(parts.unbind(0))], [x.contiguous()]).wait()
        return parts.transpose(0, 1).reshape(len(x), self.size * x.shape[1])

    def broadcast(self, block: Tensor) -> None:
        """Rank 0's `block` into that of every other rank."""
        self._group.broadcast([block]).wait()


def _open_gloo(store: Any, rank: int, size: int) -> Any:
    # The only way to say which network interface it listens on.
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=SECONDS_TO_MEET)
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def _open_nccl(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=SECONDS_TO_MEET)
    return dist.ProcessGroupNCCL(store, rank, size, options)
