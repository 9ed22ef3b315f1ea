"""What the steps run on and how much of it: a GPU with a published model, or the CPU with a tiny one instead."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Sizes of all steps."""

    device: str
    shape: str
    """Of `benchmarks.models.shapes`."""
    dtype: str
    batches: tuple[int, ...]
    """Requests at one time."""
    baseline_batches: tuple[int, ...]
    """The same beside transformers and the eager model, which take much longer."""
    rounds: int
    tokens: int
    """Decode steps of a round."""
    gemm_rows: tuple[int, ...]
    prefills: tuple[tuple[int, ...], ...]
    """Rows of each sequence, per measurement of attention."""
    decodes: tuple[tuple[int, int], ...]
    """(sequences, rows of each in the cache), per measurement."""
    cold_bytes: int
    """Inputs of a kernel that is timed, together: several times the last cache."""
    test_files: tuple[str, ...]
    marks: str
    """pytest's -m of the tests."""
    processes: int
    """Tests that run at one time."""
    scenes: int
    """Pictures that the trained model is asked about, with ten questions each."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**{name: _as_tuple(value) for name, value in json.loads(text).items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


GPU_TEST_FILES = (
    *(f"tests/backends/kernels/test_{name}.py" for name in (
        "device_batching", "golden_device", "graphs", "hr_device", "quantized_device", "stage_graphs",
    )),
    *(f"tests/ops/test_{name}.py" for name in (
        "activation", "advance_layout", "attention", "attention_decode", "attention_extend", "attention_windows",
        "kept_rows", "last_row_scores", "norm", "pool", "quantize", "rope", "route", "sample", "segmented_top_k",
    )),
)  # fmt: skip
"""Those of kernels, devices and the runtime that have tests which run on a GPU: a test looks for others."""
GPU = Settings(
    device="cuda",
    shape="llava-1.5-7b",
    dtype="bfloat16",
    batches=(1, 8, 32),
    baseline_batches=(1, 8),
    rounds=5,
    tokens=16,
    gemm_rows=(1, 8, 32, 69, 96, 204, 636, 20352),
    prefills=((636,), (636,) * 8, (636,) * 32, (69,) * 32, (636, 204, 96, 69) * 8),
    decodes=((1, 640), (8, 640), (32, 640), (64, 592)),
    cold_bytes=256 << 20,
    test_files=GPU_TEST_FILES,
    marks="gpu and not hypothesis",
    processes=8,
    scenes=20,
)
STAND_IN = Settings(
    device="cpu",
    shape="tiny",
    dtype="float32",
    batches=(1, 2),
    baseline_batches=(1,),
    rounds=1,
    tokens=2,
    gemm_rows=(1, 8),
    prefills=((20,), (9, 5)),
    decodes=((2, 32),),
    cold_bytes=1 << 20,
    test_files=("tests/ops/test_segmented_top_k.py",),
    marks="not gpu and not hypothesis",
    processes=2,
    scenes=1,
)
