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
from dpn_rt.format.weight_spec import TENSOR_ALIGNMENT
from dpn_rt.schema.weights import WeightSpec

HEADER_LIMIT = 100_000_000
"""Largest header in bytes that the safetensors format allows."""

CHUNK_BYTES = 16 << 20
"""Bytes that are written, hashed and reported at a time; small enough for smooth progress and a quick Ctrl-C."""

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
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
    whole = torch.empty(0, dtype=torch.uint8).set_(cast(torch.UntypedStorage, storage))
    tensors = {}
    for name, weight in spec.items():
        tensors[name] = whole[start : start + weight.num_bytes].view(weight.dtype).view(weight.shape)
        start += weight.num_bytes
    return tensors


def check_weights(path: Path, spec: Mapping[str, WeightSpec]) -> int:
    """Compare the file's header and size with `spec`, and return the first tensor's offset in bytes.

    Raises:
        EngineError: the header is damaged, or names, shapes, dtypes, order or size differ. The message lists all
            differences of the first of these kinds that is found.
    """
    entries, start = _read_header(path)
    found = {name: _parse_entry(path, name, entry) for name, entry in entries.items()}
    problems = [f"{name} is missing" for name in spec if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in spec]
    problems += [
        f"{name}: expected {describe(weight)}, got {describe(found[name][0])}"
        for name, weight in spec.items()
        if name in found and found[name][0] != weight
    ]
    offset = 0
    for name, weight in spec.items() if not problems else ():
        if found[name][1] != (offset, offset + weight.num_bytes):
            problems.append(f"{name}: expected bytes {offset} to {offset + weight.num_bytes}, got {found[name][1]}")
        offset += weight.num_bytes
    size = path.stat().st_size
    if not problems and size != start + offset:
        problems.append(f"expected {start + offset} bytes, the file has {size}")
    if problems:
        raise EngineError(f"{path}: {'; '.join(problems)}")
    return start


def _read_header(path: Path) -> tuple[dict[str, object], int]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_LIMIT, path.stat().st_size):
                raise EngineError(f"{path}: header of {length} bytes in a file of {path.stat().st_size} bytes: damaged")
            entries = json.loads(file.read(length))
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(f"{path}: header is not JSON: damaged") from error
    if not isinstance(entries, dict):
        raise EngineError(f"{path}: header is not a JSON object: damaged")
    entries.pop("__metadata__", None)
    if (8 + length) % TENSOR_ALIGNMENT:
        raise EngineError(f"{path}: tensors start at byte {8 + length}, expected a multiple of {TENSOR_ALIGNMENT}")
    return entries, 8 + length


def _parse_entry(path: Path, name: str, entry: object) -> tuple[WeightSpec, tuple[int, int]]:
    try:
        if not isinstance(entry, dict):
            raise TypeError
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        return WeightSpec(shape, _DTYPES[entry["dtype"]]), (begin, end)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path}: header entry of {name} is damaged: {entry!r}") from error


def describe(weight: WeightSpec) -> str:
    """Shape and dtype for an error message, such as `[2, 3] float32`."""
    return f"{list(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"
