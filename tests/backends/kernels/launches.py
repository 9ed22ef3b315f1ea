"""Counts what a GPU would be asked to launch, on the host that stands in for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dpn_rt import _kernels
from dpn_rt.device.host import RepeatedStep
from tests.places import CountingDevice

KERNELS = {
    "activation": 1,
    "add_layer_norm": 1,
    "add_rms_norm": 1,
    "advance_layout": 2,
    "attention": 1,
    "attention_decode": 1,
    "attention_extend": 1,
    "dequantize": 1,
    "layer_norm": 1,
    "pool": 1,
    "quantize": 1,
    "rms_norm": 1,
    "rope_store": 1,
    "route": 2,
    "sample": 1,
    "sample_greedy": 1,
    "silu_mul": 1,
}
"""Launches of our kernels, by docs/cuda.md. A product of ours on the host is torch's one on a GPU."""
PRODUCTS = ("linear", "linear_int4", "linear_int8")
FREE = ("empty", "new_empty", "detach", "lift_fresh", "_local_scalar_dense", "resolve_neg", "resolve_conj")
"""Beginnings of the names of torch's operators that launch nothing."""


class Launches(TorchDispatchMode):
    """Names of launches, with their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        may_alias = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not name.startswith(FREE) and not (may_alias and is_view(result, args)):
            self.counts[name] += 1
        return result


def is_view(result: Any, args: Any) -> bool:
    """Whether the result, or its first part, is in the memory of the first argument: `to` copies or does not."""
    first, source = (value[0] if isinstance(value, list | tuple) else value for value in (result, args[0]))
    return bool(first.untyped_storage().data_ptr() == source.untyped_storage().data_ptr())


@contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Launches of what runs inside. A graph is one, and transfers are none."""
    launches = Launches()

    def inner(name: str, original: Callable[..., Any], number: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                before = launches.counts.copy()
                result = original(*args, **kwargs)
            launches.counts = before + Counter({name: number})
            return result

        return call

    with monkeypatch.context() as patch:
        for name, number in KERNELS.items():
            patch.setattr(_kernels, name, inner(name, getattr(_kernels, name), number))
        for name in PRODUCTS:
            patch.setattr(_kernels, name, inner("product", getattr(_kernels, name), 1))
        # torch's on a GPU.
        patch.setattr(_kernels, "embedding", inner("index_select", _kernels.embedding, 1))
        patch.setattr(RepeatedStep, "replay", inner("graph", RepeatedStep.replay, 1))
        for name in ("upload", "read", "staging"):
            patch.setattr(CountingDevice, name, inner("transfer", getattr(CountingDevice, name), 0))
        with launches:
            yield launches
