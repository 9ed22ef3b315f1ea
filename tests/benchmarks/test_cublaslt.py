"""What cublasLt is asked for is the product of a linear layer, with a stand-in for the library on the host's memory."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu_quick.cublaslt import CublasLt, HeuristicResult
from benchmarks.gpu_quick.gemm import Case, time_algorithm, try_algorithms
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import STAND_IN

NOT_SUPPORTED = 15


class HostLt:
    """Computes as cublasLt.h says: matrices column by column, each with its own leading dimension, in float32."""

    def __init__(self, offsets: list[float]) -> None:
        """Args: offsets: one per algorithm, what it adds to the right result; NaN: the algorithm is not supported."""
        self.offsets, self.made = offsets, [object()]

    def __getattr__(self, name: str) -> Any:
        """cublasLtMatmulDescCreate: `matmul_desc_create`."""
        return getattr(self, re.sub(r"(?<!^)([A-Z])", r"_\1", name.removeprefix("cublasLt")).lower())

    def _make(self, target: Any, made: object) -> int:
        self.made.append(made)
        target._obj.value = len(self.made) - 1
        return 0

    def create(self, target: Any) -> int:
        return self._make(target, "handle")

    def matmul_desc_create(self, target: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (68, 0)
        return self._make(target, {})

    def matmul_desc_set_attribute(self, product: Any, attribute: Any, value: Any, size: Any) -> int:
        assert size.value == ctypes.sizeof(value._obj)
        self.made[product.value][attribute.value] = value._obj.value
        return 0

    def matrix_layout_create(self, target: Any, dtype: Any, rows: Any, columns: Any, leading: Any) -> int:
        assert dtype.value == 0
        return self._make(target, (rows.value, columns.value, leading.value))

    def matmul_preference_create(self, target: Any) -> int:
        return self._make(target, {})

    matmul_preference_set_attribute = matmul_desc_set_attribute

    def matmul_preference_destroy(self, preference: Any) -> int:
        assert self.made[preference.value] == {1: 64}, "the workspace's size"
        return 0

    def matmul_algo_get_heuristic(self, *arguments: Any) -> int:
        count, results, found = arguments[-3:]
        found._obj.value = min(count.value, len(self.offsets))
        for number, offset in enumerate(self.offsets[: count.value]):
            results[number].algorithm[0] = number
            results[number].state = NOT_SUPPORTED if np.isnan(offset) else 0
        return 0

    def _matrix(self, address: Any, layout: Any) -> np.ndarray:
        rows, columns, leading = self.made[layout.value]
        flat = (ctypes.c_float * (leading * columns)).from_address(address.value)
        return np.frombuffer(flat, np.float32).reshape(columns, leading).T[:rows]

    def matmul(self, handle: Any, product: Any, alpha: Any, *arguments: Any) -> int:
        a, a_layout, b, b_layout, beta, c, _, d, d_layout, result, _, workspace_size, _ = arguments
        assert (alpha._obj.value, beta._obj.value, workspace_size.value) == (1, 0, 64) and c.value == d.value
        left = self._matrix(a, a_layout)
        left = left.T if self.made[product.value].get(3) == 1 else left
        self._matrix(d, d_layout)[...] = left @ self._matrix(b, b_layout) + self.offsets[result._obj.algorithm[0]]
        return 0


@pytest.mark.parametrize(("rows", "columns", "features"), [(1, 3, 5), (7, 4, 2), (2, 8, 8)])
def test_products_are_those_of_a_linear_layer(rows: int, columns: int, features: int) -> None:
    library = CublasLt(HostLt([0.0, np.nan, 100.0]), torch.empty(64, dtype=torch.uint8))
    case = Case("o", torch.randn(rows, columns), [torch.randn(features, columns)])
    found = library.algorithms(case.x, case.weights[0], 8)
    assert [algorithm.result.algorithm[0] for algorithm in found] == [0, 2], "only what is supported"
    out, expected = torch.empty(rows, features), F.linear(case.x, case.weights[0])
    assert time_algorithm(found[0], case, out, expected, "cpu") > 0
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="differs from torch by"):
        time_algorithm(found[1], case, out, expected, "cpu")
    assert len(library.algorithms(case.x, case.weights[0], 1)) == 1


def test_a_refusal_is_told() -> None:
    host = HostLt([0.0])
    library = CublasLt(host, torch.empty(64, dtype=torch.uint8))
    host.matmul_desc_create = lambda *_: NOT_SUPPORTED  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescCreate: status 15"):
        library.algorithms(torch.randn(2, 2), torch.randn(2, 2), 1)


def test_the_layout_of_a_result_is_that_of_the_header() -> None:
    offsets = [getattr(HeuristicResult, name).offset for name in ("workspace_size", "state", "waves", "reserved")]
    assert offsets == [64, 72, 76, 80] and ctypes.sizeof(HeuristicResult) == 96


def test_a_product_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    library, asked = CublasLt(HostLt([0.0]), torch.empty(64, dtype=torch.uint8)), []
    algorithms = library.algorithms

    def refuse_the_second(*given: Any) -> Any:
        asked.append(given)
        if len(asked) == 2:
            raise RuntimeError("cublasLtMatmulAlgoGetHeuristic: status 15")
        return algorithms(*given)

    library.algorithms = refuse_the_second  # type: ignore[method-assign]
    record = Recorder(tmp_path / "step.json", tmp_path)
    try_algorithms(STAND_IN, torch.float32, record, library)
    times = [each["seconds"] for each in record.values["algorithms"]]
    assert len(asked) == 4 * len(STAND_IN.gemm_rows)
    assert [len(each) for each in times] == [1, 0] + [1] * (len(asked) - 2)
    assert record.failed_parts == [f"algorithms of qkv x{STAND_IN.gemm_rows[1]}"]
