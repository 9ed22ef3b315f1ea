"""One file of weights, read tensor by tensor. Reading never runs code from the file."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpn_rt.errors import CheckpointError

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
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS_MARK))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
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
        tensors = {}
        try:
            with safe_open(self.path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    view = file.get_slice(name)
                    dtype = view.get_dtype()
                    tensors[name] = TensorInfo(tuple(view.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype.lower()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: truncated or damaged: {error}") from error
        return tensors

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
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error

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
            if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
                raise CheckpointError(
                    f"{self.path}: expected a dictionary of tensors, as torch.save writes a state dict"
                )
            self._tensors = content
        return self._tensors

    def _load(self, mmap: bool) -> object:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about pickle protocols; failures are raised
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            # "Unsupported": names and instructions that tensors do not need, or the bytes of a file that is no pickle.
            if "unsupported" in str(error).lower() and self._is_pickle():
                raise CheckpointError(
                    f"{self.path}: refused: the pickle holds more than tensors, and loading it could run code; "
                    "convert the checkpoint to safetensors where you trust it"
                ) from error
            raise CheckpointError(f"{self.path}: truncated or damaged: not a file that torch.save wrote") from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if mmap and "_use_new_zipfile_serialization" in str(error):
                return self._load(mmap=False)  # written before torch 1.6: the shard is read into memory
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path}: truncated or damaged: {reason}") from error

    def _is_pickle(self) -> bool:
        """Whether the file starts like a zip archive of `torch.save`, or like a pickle of protocol 2 or later."""
        with self.path.open("rb") as file:
            return file.read(2).startswith((b"PK", b"\x80"))
