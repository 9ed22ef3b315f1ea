"""The CUDA kernels compiled as host code (`emulation/README.md`). CPU tensors are passed as if they were on a GPU."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "emulation"
BUILD = FOLDER.parents[2] / "build" / "emulation"
CUDA = 1
DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4, torch.float64: 5,
    torch.uint8: 6, torch.int8: 7, torch.float8_e4m3fn: 8,
}  # fmt: skip
OTHER_DTYPE = 9
MAX_DIMS = 8


class TensorStruct(ctypes.Structure):
    """`dpn::Tensor` of csrc/core/tensor.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_uint8),
        ("device", ctypes.c_uint8),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_DIMS),
        ("strides", ctypes.c_int64 * MAX_DIMS),
    ]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorStruct:
        return cls(
            tensor.data_ptr(), DTYPES.get(tensor.dtype, OTHER_DTYPE), CUDA, 0, tensor.ndim,
            (ctypes.c_int64 * MAX_DIMS)(*tensor.shape), (ctypes.c_int64 * MAX_DIMS)(*tensor.stride()),
        )  # fmt: skip


class KernelError(Exception):
    """An exception from an op of the emulation."""


class Kernels:
    """The ops, by the names and with the arguments of `dpn_rt._kernels`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def number(self, name: str, *arguments: object) -> int:
        """Calls a function that returns an integer."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return function(*(c_argument(a) for a in arguments))

    def __getattr__(self, name: str):
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p

        def call(*arguments: object) -> None:
            ranges = dict(tensor_ranges(arguments))
            begins = [addresses.start for addresses in ranges.values()]
            sizes = [len(addresses) for addresses in ranges.values()]
            self._library.set_tensors(
                (ctypes.c_void_p * len(ranges))(*begins),
                (ctypes.c_int64 * len(ranges))(*sizes),
                ctypes.c_int64(len(ranges)),
            )
            message = function(*(c_argument(a) for a in arguments))
            if message is not None:
                raise KernelError(with_tensor_named(message.decode(), ranges))

        return call


def tensor_ranges(arguments: tuple[object, ...]) -> Iterator[tuple[str, range]]:
    """What each tensor among arguments is, and the addresses of its bytes."""
    for number, argument in enumerate(arguments):
        for tensor in argument if isinstance(argument, list) else [argument]:
            if isinstance(tensor, Tensor):
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                size = (last + 1) * tensor.itemsize if tensor.numel() else 0
                what = f"argument {number}, {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                yield f"{what} at {tensor.data_ptr():#x}", range(tensor.data_ptr(), tensor.data_ptr() + size)


def with_tensor_named(message: str, ranges: dict[str, range]) -> str:
    """The message about an invalid address, with its place relative to the nearest of the tensors."""
    found = re.search(r"address (\d+)", message)
    if found is None or not ranges:
        return message
    address = int(found.group(1))

    def distance(addresses: range) -> int:
        return max(addresses.start - address, address - addresses.stop + 1)

    name, nearest = min(ranges.items(), key=lambda item: distance(item[1]))
    before, after = nearest.start - address, address - nearest.stop
    place = f"{before} bytes before" if before > 0 else f"{after} bytes after the end of"
    return message.replace(found.group(), f"{place} {name}")


def c_argument(value: object) -> object:
    """Converts tensors to pointers to structures, and a list of tensors to an array. Pass the array's length too."""
    if isinstance(value, Tensor):
        return ctypes.byref(TensorStruct.of(value))
    if isinstance(value, list):
        return (TensorStruct * len(value))(*(TensorStruct.of(t) for t in value))
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    return value


def build() -> Kernels:
    """Compile the sources that have changed, one process at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile_emulation()
    return Kernels(ctypes.CDLL(str(BUILD / "libemulation.so")))


def compile_emulation() -> None:
    command = [
        "make",
        "-C",
        str(FOLDER),
        f"BUILD={BUILD}",
        f"-j{os.cpu_count()}",
        "--no-print-directory",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the emulation does not compile:\n{result.stderr}")
