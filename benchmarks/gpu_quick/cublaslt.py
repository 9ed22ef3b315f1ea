"""The algorithms that cublasLt's heuristic proposes for a product, one by one: torch runs only the first.

Calls the library that torch has loaded. Values of enumerations and the layout of a result are those of cublasLt.h.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 * 2**20
"""As torch gives cublasLt on a GPU of capability 9.0."""
NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
COMPUTE_32F, R_32F, OP_T = 68, 0, 1
DTYPES = {torch.float32: R_32F, torch.float16: 2, torch.bfloat16: 14}
TRANSA, MAX_WORKSPACE_BYTES = 3, 1  # attributes of a product and of a preference


class HeuristicResult(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_size", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLt:
    """A handle of the library."""

    def __init__(self, library: Any, workspace: Tensor) -> None:
        """
        Args:
            library: cublasLt, as ctypes loads it.
            workspace: `[num_bytes]` uint8 on the GPU.
        """
        self._library, self._workspace, self._handle = library, workspace, c_void_p()
        self._call("cublasLtCreate", byref(self._handle))

    @classmethod
    def open(cls, device: str) -> Self:
        """The library of torch's own version of CUDA.

        Raises:
            OSError: there is none.
        """
        torch.zeros(1, 1, device=device) @ torch.zeros(1, 1, device=device)  # loads it
        major = (torch.version.cuda or "").partition(".")[0]
        names = [name for name in NAMES if name.endswith(f".{major}")] or NAMES
        return cls(ctypes.CDLL(names[0]), torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: status {status}")

    def _created(self, name: str, *arguments: Any) -> c_void_p:
        created = c_void_p()
        self._call(name, byref(created), *arguments)
        return created

    def algorithms(self, x: Tensor, weight: Tensor, count: int) -> list[Algorithm]:
        """Up to `count` algorithms for `x @ weight.T`, the one that the heuristic thinks fastest first.

        Args:
            x: `[rows, columns]`, contiguous.
            weight: `[features, columns]`, contiguous, of the same dtype.
        """
        (rows, columns), features, dtype = x.shape, weight.shape[0], DTYPES[x.dtype]
        # Matrices are column by column there: out.T = weight x.T, where weight is seen as its own transpose.
        product = self._created("cublasLtMatmulDescCreate", c_int(COMPUTE_32F), c_int(R_32F))
        transposed = c_int32(OP_T)
        self._call("cublasLtMatmulDescSetAttribute", product, c_int(TRANSA), byref(transposed), c_size_t(4))
        layouts = [
            self._created(
                "cublasLtMatrixLayoutCreate", c_int(dtype), c_uint64(height), c_uint64(width), c_int64(height)
            )
            for height, width in ((columns, features), (columns, rows), (features, rows))
        ]
        preference = self._created("cublasLtMatmulPreferenceCreate")
        most = c_uint64(self._workspace.numel())
        self._call(
            "cublasLtMatmulPreferenceSetAttribute", preference, c_int(MAX_WORKSPACE_BYTES), byref(most), c_size_t(8)
        )
        results, found = (HeuristicResult * count)(), c_int(0)
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, product, *layouts, layouts[2], preference,
            c_int(count), results, byref(found),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [Algorithm(self, product, layouts, result) for result in results[: found.value] if result.state == 0]

    def run(self, algorithm: Algorithm, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Queues the product on torch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        one, zero = c_float(1), c_float(0)
        weights, rows, products = algorithm.layouts
        self._call(
            "cublasLtMatmul", self._handle, algorithm.product, byref(one), c_void_p(weight.data_ptr()), weights,
            c_void_p(x.data_ptr()), rows, byref(zero), c_void_p(out.data_ptr()), products, c_void_p(out.data_ptr()),
            products, byref(algorithm.result), c_void_p(self._workspace.data_ptr()),
            c_size_t(self._workspace.numel()), c_void_p(stream),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Algorithm:
    """One way to compute a product of given sizes."""

    library: CublasLt
    product: c_void_p
    layouts: list[c_void_p]
    """Of the weights, the rows and the result."""
    result: HeuristicResult

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """out `[rows, features]` = x `[rows, columns]` @ weight `[features, columns]`.T, queued."""
        self.library.run(self, x, weight, out)
