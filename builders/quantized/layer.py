"""The tensors of one layer, checked as they are looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.errors import CheckpointError

FLOATS = ("bfloat16", "float16", "float32")
INTEGERS = ("int8", "uint8", "int32", "int64")


@dataclass(frozen=True)
class Layer:
    """The tensors of `files` whose names are `name` and a suffix such as `qweight`."""

    files: Checkpoint
    name: str

    def __contains__(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self.files.tensors

    def find(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorInfo:
        """A tensor with one of `dtypes` and of `shapes`; without `shapes`, with two dimensions.

        Raises:
            CheckpointError: it is missing or another one.
        """
        name = f"{self.name}.{suffix}"
        info = self.files.tensors.get(name)
        wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes) or '[rows, columns]'}"
        if info is None:
            raise CheckpointError(f"{name} is missing (expected {wanted})")
        fits = info.shape in shapes if shapes else len(info.shape) == 2 and 0 not in info.shape
        if info.dtype not in dtypes or not fits:
            raise CheckpointError(f"{name} (expected {wanted}, got {info.dtype} {list(info.shape)})")
        return info

    def reader(self, suffix: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Callable[[], Tensor]:
        """Reads a tensor when it is called, and changes it."""
        return lambda: change(self.files.read(f"{self.name}.{suffix}"))

    def group_size(self, suffix: str, columns: int, groups: int, named: Iterable[int]) -> int:
        """Columns that share a scale.

        Args:
            suffix: of the scales, for messages.
            columns: of a row.
            groups: scales of a row.
            named: sizes that config.json names; -1 is a whole row.

        Raises:
            CheckpointError: no size gives this number of groups, or several do.
        """
        whole = {columns if size <= 0 else min(size, columns) for size in named} or {columns}
        sizes = sorted(size for size in whole if -(-columns // size) == groups)
        if len(sizes) > 1:
            raise CheckpointError(
                f"{self.name}.{suffix}: {groups} for a row of {columns} columns may be groups of "
                f"{' or '.join(map(str, sizes))}, which config.json both names: expected numbers that tell them apart"
            )
        if sizes:
            return sizes[0]
        right = sorted({-(-columns // size) for size in whole})
        raise CheckpointError(
            f"{self.name}.{suffix}: {groups} for a row of {columns} columns, expected {' or '.join(map(str, right))} "
            "as group_size in config.json says"
        )

    def check_in_order(self, suffix: str, columns: int, group_size: int) -> None:
        """Refuse columns that are not in the order of their groups, where the layer has a list of these.

        Raises:
            CheckpointError: the list has another shape, or another order.
        """
        if suffix not in self:
            return
        self.find(suffix, INTEGERS, (columns,))
        index = self.files.read(f"{self.name}.{suffix}")
        expected = torch.arange(columns, device="cpu") // group_size
        if not torch.equal(index.long(), expected) and not bool((index == -1).all()):  # -1: never set
            raise CheckpointError(
                f"{self.name}.{suffix}: act-order (desc_act) is not read: expected column k in group k // {group_size}"
            )
