"""A safetensors file that is written one tensor at a time, and read by mapping it into memory.

The library's own writer needs all tensors in memory at once. This one writes the header first, from the known shapes,
and then one tensor after the other. The bytes depend only on the contents.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dpn_rt.errors import EngineError
from dpn_rt.format.safetensors_header import StoredTensor, read_header
from dpn_rt.format.weight_spec import TENSOR_ALIGNMENT, describe, differences
from dpn_rt.schema.text import few
from dpn_rt.schema.weights import WeightSpec

CHUNK_BYTES = 16 << 20
"""Bytes that are written, hashed and reported at a time; small enough for smooth progress and a quick Ctrl-C."""

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def write_weights(
    path: Path, spec: Mapping[str, WeightSpec], weights: Iterable[tuple[str, Tensor]], progress: Callable[[int], None]
) -> str:
    """Write `weights` and return the file's sha256.

    Args:
        path: of the new file.
        spec: of every weight by canonical name, in the order of the file.
        weights: (canonical name, tensor) in the same order.
        progress: is called with the number of tensor bytes written since the last call.

    Raises:
        EngineError: a tensor's name, shape or dtype differs from `spec` at its place, or tensors are missing.
    """
    digest = hashlib.sha256()
    expected = iter(spec.items())
    with path.open("wb") as file:
        header = _header(spec)
        file.write(header)
        digest.update(header)
        for name, tensor in weights:
            _check_next(name, tensor, next(expected, None))
            data = tensor_bytes(tensor)
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
                progress(len(chunk))
        missing = [name for name, _ in expected]
        if missing:
            raise EngineError(f"weights are missing: {', '.join(missing)}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order. There is no copy where the tensor is contiguous and on the CPU."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _check_next(name: str, tensor: Tensor, expected: tuple[str, WeightSpec] | None) -> None:
    if expected is None or expected[0] != name:
        wanted = "no further weight" if expected is None else expected[0]
        raise EngineError(f"weight {name} is out of place: the engine's weight list has {wanted} here")
    actual = WeightSpec(tuple(tensor.shape), tensor.dtype)
    if actual != expected[1]:
        raise EngineError(f"weight {name}: expected {describe(expected[1])}, got {describe(actual)}")


def _header(spec: Mapping[str, WeightSpec]) -> bytes:
    entries, offset = {}, 0
    for name, weight in spec.items():
        end = offset + weight.num_bytes
        dtype = _DTYPE_NAMES[weight.dtype]
        entries[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % TENSOR_ALIGNMENT  # trailing spaces, which the format allows, align the first tensor
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


def map_weights(path: Path, spec: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """The tensors of `spec` as views of the mapped file. A page of the file is read when it is first used.

    Raises:
        EngineError: the file cannot be read, or holds other weights than `spec`.
    """
    start = check_weights(path, spec)
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(cast(torch.UntypedStorage, storage))
    tensors = {}
    for name, weight in spec.items():
        tensors[name] = whole[start : start + weight.num_bytes].view(weight.dtype).view(weight.shape)
        start += weight.num_bytes
    return tensors


def check_weights(path: Path, spec: Mapping[str, WeightSpec]) -> int:
    """Compare the file's header and size with `spec`, and return the first tensor's offset in bytes.

    Raises:
        EngineError: the header is damaged, or names, shapes, dtypes, order or size differ. The message lists
            differences of the first of these kinds that is found.
    """
    header = read_header(path, EngineError)
    found = {name: WeightSpec(tensor.shape, _dtype(path, name, tensor)) for name, tensor in header.tensors.items()}
    problems = differences(spec, found)
    offset = 0
    for name, weight in spec.items() if not problems else ():
        place = header.tensors[name].begin, header.tensors[name].end
        if place != (offset, offset + weight.num_bytes):
            problems.append(f"{name}: expected bytes {offset} to {offset + weight.num_bytes}, got {place}")
        offset += weight.num_bytes
    if not problems and header.size % TENSOR_ALIGNMENT:
        problems.append(f"tensors start at byte {header.size}, expected a multiple of {TENSOR_ALIGNMENT}")
    if problems:
        raise EngineError(f"{path}: {few(problems, '; ')}")
    return header.size


def _dtype(path: Path, name: str, tensor: StoredTensor) -> torch.dtype:
    if tensor.dtype not in _DTYPES:
        raise EngineError(f"{path}: {name} has the dtype {tensor.dtype!r:.40}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[tensor.dtype]
