"""One file of weights, read tensor by tensor. Reading never runs code from the file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpn_rt.builders.archive import check_archive
from dpn_rt.errors import CheckpointError
from dpn_rt.format.safetensors_header import read_header
from dpn_rt.schema.files import open_file

GIT_LFS_MARK = b"version https://git-lfs"
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """torch's name of the dtype, such as float16, bfloat16 or int8."""


class Shard(Protocol):
    """A file of named tensors."""

    path: Path

    def list_tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, without reading the tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, which may be a view of the mapped file."""
        ...

    def close(self) -> None:
        """Unmap the file."""
        ...


def open_shard(path: Path) -> Shard:
    """The reader for a file, chosen by its name.

    Raises:
        CheckpointError: the file is missing, empty, or a Git LFS pointer instead of the weights.
    """
    with open_file(path, CheckpointError) as file:
        start = file.read(len(GIT_LFS_MARK))
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    if start == GIT_LFS_MARK:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` in the checkpoint")
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickleShard(path)


class SafetensorsShard:
    """A `.safetensors` file.

    The file is mapped again for every tensor, so that a tensor's pages are freed with the tensor. One long-lived
    mapping would keep everything that was read in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def list_tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, from the header.

        Raises:
            CheckpointError: the file is truncated or damaged.
        """
        found = read_header(self.path, CheckpointError).tensors.items()
        return {name: TensorInfo(each.shape, _dtype_name(each.dtype)) for name, each in found}

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file.

        Raises:
            CheckpointError: the file has changed since its tensors were listed.
        """
        try:
            with safe_open(self.path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be read: the file has changed, or has a tensor of a dtype that "
                "safetensors does not know"
            ) from error

    def close(self) -> None:
        """Nothing to do: no mapping is kept."""


class PickleShard:
    """A `.bin` file, opened only with torch's restricted unpickler. It stays mapped until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] | None = None

    def list_tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor.

        Raises:
            CheckpointError: the file is truncated or damaged, would run code, or holds something other than tensors.
        """
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._open().items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file."""
        return self._open()[name]

    def close(self) -> None:
        """Unmap the file."""
        self._tensors = None

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            content = self._load(mmap=True)
            if not isinstance(content, dict) or not all(
                isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
            ):
                raise CheckpointError(
                    f"{self.path}: expected a dictionary of tensors, as torch.save writes a state dict"
                )
            other = next((name for name, tensor in content.items() if not _is_plain(tensor)), None)
            if other is not None:
                raise CheckpointError(f"{self.path}: {other}: expected a dense tensor whose values are in the file")
            self._tensors = content
        return self._tensors

    def _load(self, mmap: bool) -> object:
        check_archive(self.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about pickle protocols; failures are raised
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # of any kind: bytes that were changed lead the library anywhere
            if mmap and "_use_new_zipfile_serialization" in str(error):
                return self._load(mmap=False)  # written before torch 1.6: the shard is read into memory
            raise CheckpointError(f"{self.path}: truncated or damaged: not a file that torch.save wrote") from error


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are bytes of the file, as those of sparse, quantised and empty ("meta") tensors are not."""
    is_dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return is_dense and tensor.device.type == "cpu" and not tensor.is_neg()


def _dtype_name(name: str) -> str:
    return _SAFETENSORS_DTYPES.get(name, name.lower()[:40])
