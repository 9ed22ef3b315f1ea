"""A matrix that a checkpoint has in fewer bits: what it stands for, and whether an engine can take it over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt.errors import CheckpointError
from dpn_rt.model.weights.weight import QuantizedWeight

Read = Callable[[], Tensor]


class Matrix(Protocol):
    """A quantised matrix `[out_features, in_features]`. Nothing is read before `read` or `scale_for`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that the tensors stand for."""

    @property
    def dtype(self) -> str:
        """Of its scales: the dtype that the model had before it was quantised."""

    @property
    def kind(self) -> str:
        """Such as "4 bits", for messages."""

    @property
    def is_w8(self) -> bool:
        """Whether it is 8-bit integers with one scale a row and no zero points."""

    def read(self) -> Tensor:
        """What the tensors stand for, float32.

        Raises:
            CheckpointError: a scale is infinite or NaN, or 0 for integers that are not.
        """

    def scale_for(self, form: type[QuantizedWeight]) -> Tensor | None:
        """The scales with which `form` stores exactly the published numbers; None where it cannot.

        Returns:
            As `QuantizedWeight.quantize` takes them, float32.
        """


@dataclass(frozen=True)
class IntegerMatrix:
    """A `Matrix` of values `(q - zero) * scale`, with one scale and zero point for `group_size` columns of a row."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    """Columns; those of the whole row where it has one scale."""
    dtype: str
    scale_name: str
    """Published name of the scales."""
    read_integers: Read
    """Gives `[out_features, in_features]` int8, from -2^(bits - 1) to 2^(bits - 1) - 1."""
    read_scale: Read
    """Gives `[out_features, groups]` of any float dtype."""
    read_zero: Read | None
    """Gives `[out_features, groups]` int8, which counts as the integers do; None: all are 0."""

    @property
    def kind(self) -> str:
        return f"{self.bits} bits"

    @property
    def is_w8(self) -> bool:
        return self.bits == 8 and self.group_size >= self.shape[1] and self.read_zero is None

    def read(self) -> Tensor:
        scale, columns = self._scale(), self.shape[1]
        q = functional.pad(self.read_integers().float(), (0, -columns % self.group_size))
        groups = q.view(len(q), -1, self.group_size)
        if self.read_zero is not None:
            groups -= self.read_zero()[..., None]
            q[:, columns:] = 0
        if (scale == 0).any() and (lost := (scale == 0) & (groups != 0).any(dim=-1)).any():
            raise CheckpointError(
                f"{self.scale_name}: the scale is 0 where integers are not, {_place(lost)}: expected a number other "
                "than 0"
            )
        groups *= scale[..., None]
        return q[:, :columns]

    def scale_for(self, form: type[QuantizedWeight]) -> Tensor | None:
        columns = self.shape[1]
        if form.number != "integer":
            return None
        per_row = self.group_size >= columns
        if not per_row and (form.group is None or self.group_size % form.group):
            return None
        half = 1 << (self.bits - 1)
        zero = torch.zeros(1, dtype=torch.int8, device="cpu") if self.read_zero is None else self.read_zero()
        if -half - int(zero.max()) < form.least or half - 1 - int(zero.min()) > form.largest:
            return None
        scale = self._scale()
        if form.group is None:
            return scale[:, 0]
        times = -(-columns // form.group) if per_row else self.group_size // form.group
        return scale.repeat_interleave(times, dim=1)[:, : -(-columns // form.group)]

    def _scale(self) -> Tensor:
        scale = self.read_scale().float()
        broken = ~scale.isfinite()
        if broken.any():
            raise CheckpointError(f"{self.scale_name}: holds infinite values or NaN, {_place(broken)}")
        return scale


@dataclass(frozen=True)
class FloatMatrix:
    """A `Matrix` of 8-bit floats with one scale for the whole or for each row."""

    shape: tuple[int, int]
    dtype: str
    scale_name: str
    read_floats: Read
    """Gives `[out_features, in_features]`."""
    read_scale: Read
    """Gives `[out_features, 1]`."""

    @property
    def kind(self) -> str:
        return "fp8"

    @property
    def is_w8(self) -> bool:
        return False

    def read(self) -> Tensor:
        return self.read_floats().float().mul_(self._scale())

    def scale_for(self, form: type[QuantizedWeight]) -> Tensor | None:
        return self._scale()[:, 0] if form.number == "e4m3" else None

    def _scale(self) -> Tensor:
        scale = self.read_scale().float()
        broken = ~scale.isfinite()
        if (scale == 0).any():
            broken |= (scale == 0) & (self.read_floats().float() != 0).any(1, keepdim=True)
        if broken.any():
            raise CheckpointError(
                f"{self.scale_name}: holds 0, infinite values or NaN, {_place(broken)}: expected a number other than 0"
            )
        return scale


def _place(broken: Tensor) -> str:
    """The first place of a fault in `[out_features, groups]`."""
    row, group = (int(index) for index in broken.nonzero()[0])
    return f"first for output {row}, group {group}"
