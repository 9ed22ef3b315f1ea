"""A step on the host that is recorded once and repeated without Python: a `Graph` of ops alone.

Between two ops of a few rows, Python takes longer than the smaller ones of them: its own code and data have left the
processor's caches by the time that an op has read its weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpn_rt import ops
from dpn_rt.device.device import Step

_aten = torch.ops.aten
_NEW_MEMORY = (_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default)
_ALIGNMENT = 64


class NotRecordableError(Exception):
    """A step calls torch for more than memory and views, which is not recorded."""


class HostGraph:
    """A `Graph` of a step whose results are all made by `dpn_rt.ops`."""

    def __init__(self, step: Step, memory: StepMemory) -> None:
        """Runs the step, and records it.

        Args:
            step: all that it reads must stay where it is.
            memory: for what it makes.

        Raises:
            NotRecordableError: the step calls torch for values; it has run up to there.
        """
        self._step = step  # it holds the tensors that it reads
        self._calls = ops.Recording()
        with _MemoryAndViews(memory), self._calls:
            self.outputs = step()

    def replay(self) -> None:
        """Runs the step's ops.

        Raises:
            KernelArgumentError: an op refuses the values of a tensor.
        """
        self._calls.replay()


class StepMemory:
    """Memory for what steps make. A part is given again once no tensor lies in it, so steps must not run side by side.

    Graphs of several steps may share it: only what a graph returns stays in use between its replays.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self.num_bytes = 0
        """Of all parts, used or free."""

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype, device="cpu")
        block = self._take(num_bytes)
        # All tensors within a part hold this array, so it lives as long as any of them.
        held = block.numpy()[:num_bytes]
        weakref.finalize(held, self._free.append, block).atexit = False
        return torch.from_numpy(held).view(dtype).view(*shape)

    def _take(self, num_bytes: int) -> Tensor:
        """The smallest free part that is large enough, or a new one: sizes are powers of two, to fit more often."""
        fitting = [block for block in self._free if len(block) >= num_bytes]
        if fitting:
            block = min(fitting, key=len)
            self._free[:] = [other for other in self._free if other is not block]
            return block
        size = max(_ALIGNMENT, 1 << (num_bytes - 1).bit_length())
        self.num_bytes += size
        return torch.empty(size, dtype=torch.uint8, device="cpu")


class _MemoryAndViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, torch gives memory of a `StepMemory`, makes views, and does nothing else."""

    def __init__(self, memory: StepMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _NEW_MEMORY or func.is_view:
            made = func(*args, **(kwargs or {}))
            if func in _NEW_MEMORY:
                return self._memory.tensor(made.shape, made.dtype)
            if _is_view(made, args[0]):  # `contiguous`, for one, may also copy
                return made
        raise NotRecordableError(f"{func} is not recorded: a step may call torch for memory and views alone")


def _is_view(made: Any, of: Tensor) -> bool:
    """Whether a tensor, or each of several, lies in the memory of another one."""
    parts = made if isinstance(made, list | tuple) else [made]
    return all(part.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() for part in parts)
