"""A step on the host that is recorded once and repeated without Python: a `Graph` of ops alone.

Between two ops of a few rows, Python takes longer than the smaller ones of them: its own code and data have left the
processor's caches by the time that an op has read its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpn_rt.device.device import Step
from dpn_rt.device.step_memory import StepMemory
from dpn_rt.ops.recording import Recording

_aten = torch.ops.aten
_NEW_MEMORY = (_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default)
_VALUES_OF_THE_HOST = (_aten.lift_fresh.default,)
"""Operators that pass as views, of tensors that hold values of Python's."""


class NotRecordableError(Exception):
    """A step does more than call ops: it calls torch for values, or returns what no op has made."""


class HostGraph:
    """A `Graph` of a step whose values are all made by `dpn_rt.ops`.

    A step may call torch for memory and views. Other operators of torch are noticed and refused. What does not pass
    through torch's operators is not noticed and must not be in a step: numpy, `tolist`, and tensors made of the host's
    memory.
    """

    def __init__(self, step: Step, memory: StepMemory) -> None:
        """Runs the step, and records it.

        Args:
            step: all that it reads must stay where it is, and is kept by the graph as far as `step` holds it.
            memory: for what it makes.

        Raises:
            NotRecordableError: see above; the step may have run in part.
        """
        self._step, self._memory = step, memory  # kept, since the recorded calls have addresses alone
        self._calls = Recording()
        with _MemoryAndViews(memory), self._calls:
            made = step()
        self.outputs = tuple(_own_place(output, memory) for output in made)
        """Of the last run, until this or another graph with the same memory runs."""

    def replay(self) -> None:
        """Runs the step's ops.

        Raises:
            KernelArgumentError: an op refuses the values of a tensor. Those before it have run.
        """
        self._calls.replay()


def _own_place(output: Tensor, memory: StepMemory) -> Tensor:
    place = memory.alias(output) if output.is_contiguous() else None
    if place is None:
        raise NotRecordableError("a step returns a tensor that none of its ops has made")
    return place


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
        if func in _NEW_MEMORY or (func.is_view and func not in _VALUES_OF_THE_HOST):
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
