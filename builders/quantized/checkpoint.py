"""A checkpoint whose quantised weights are read as what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dpn_rt.builders.checkpoint import Checkpoint, CheckpointFiles
from dpn_rt.builders.json_values import Json
from dpn_rt.builders.quantized.formats import Format, read_format, refuse_unnamed
from dpn_rt.builders.quantized.layer import Layer
from dpn_rt.builders.quantized.matrix import Matrix
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.errors import CheckpointError
from dpn_rt.schema.text import few


class QuantizedCheckpoint:
    """A `Checkpoint` that has, for the tensors of a quantised layer, its weight in a float dtype.

    Which layers are quantised is told by the tensors that they have, not by lists of names in config.json.
    """

    def __init__(self, files: Checkpoint, form: Format) -> None:
        """
        Raises:
            CheckpointError: tensors of a layer are missing or do not fit each other; all faults are named.
        """
        self.path = files.path
        self.form = form
        self._files = files
        layers = sorted({name.rpartition(".")[0] for name in files.tensors if name.rpartition(".")[2] in form.marks})
        self.matrices: Mapping[str, Matrix] = _matrices([Layer(files, layer) for layer in layers], form, files.path)
        """By the published name of the weight."""
        self._tensors = {name: info for name, info in files.tensors.items() if not self._is_part(name)}
        self._tensors |= {name: TensorInfo(each.shape, each.dtype) for name, each in self.matrices.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by published name; the dtype of a quantised weight is that of its scales."""
        return self._tensors

    @property
    def unused(self) -> list[str]:
        """Names of tensors that round activations and the KV cache."""
        return sorted(name for name in self._files.tensors if name.rpartition(".")[2] in self.form.unused)

    @property
    def is_w8a8(self) -> bool:
        """Whether rows are rounded to 8 bits, and all quantised weights as int8 engines have them."""
        return self.form.rounds_rows and all(matrix.is_w8 for matrix in self.matrices.values())

    @property
    def kinds(self) -> str:
        """What its weights are, such as "4 bits", for messages."""
        return ", ".join(sorted({matrix.kind for matrix in self.matrices.values()}))

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; a quantised weight as float32, whatever `tensors` says.

        Raises:
            CheckpointError: scales of the weight make no sense.
        """
        return self.matrices[name].read() if name in self.matrices else self._files.read(name)

    def _is_part(self, name: str) -> bool:
        """Whether a tensor is part of a quantised weight, or rounds activations."""
        layer, _, suffix = name.rpartition(".")
        return suffix in self.form.unused or (
            suffix in ("weight", *self.form.marks) and f"{layer}.weight" in self.matrices
        )


def open_checkpoint(path: Path, config: Json) -> Checkpoint:
    """The checkpoint in a directory, quantised or not.

    Raises:
        CheckpointError: see `CheckpointFiles` and `QuantizedCheckpoint`.
        ConfigError: see `read_format`.
    """
    form = read_format(path, config)
    files = CheckpointFiles(path)
    if form is None:
        refuse_unnamed(path, files.tensors)
        return files
    return QuantizedCheckpoint(files, form)


def matrix_of(checkpoint: Checkpoint, name: str) -> Matrix | None:
    """The quantised matrix that a published weight is read from; None: it is not quantised."""
    return checkpoint.matrices.get(name) if isinstance(checkpoint, QuantizedCheckpoint) else None


def _matrices(layers: list[Layer], form: Format, path: Path) -> dict[str, Matrix]:
    matrices, faults = {}, []
    for layer in layers:
        try:
            matrices[f"{layer.name}.weight"] = form.matrix(layer)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"{path}: tensors of quantised weights do not fit each other: {few(faults, '; ')}")
    return matrices
