"""Rows of TensorRT plans in the latency benchmark, with evaluated networks instead of plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import latency
from benchmarks.comparison import measure
from benchmarks.comparison.report import print_table
from dpn_rt.backends.tensorrt import cuda
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from tests.backends.tensorrt.engines import EvaluatingReader, limits_of, write_plan_engine
from tests.skips import NO_TENSORRT

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)


def test_plans_have_rows_beside_those_of_the_products_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(source: Path, target: Path, model: ModelConfig, batch: int, rows: int) -> Path:
        weights = EngineDir.open(source).load_weights()
        return write_plan_engine(target, model, weights, limits_of(model, rows, batch, batch))

    monkeypatch.setattr(measure, "write_plan_engine", written)
    monkeypatch.setattr(cuda, "CudaPlanReader", EvaluatingReader)
    arguments = ["--dtype", "float32", "--subjects", "dpn_rt", "tensorrt", "--repeats", "1", "--tokens", "1"]
    options = latency.parse_arguments([*arguments, "--batch", "2", "--device", "cuda"])
    options.device = "cpu"  # where the evaluator runs
    report = measure.measure(options)
    print_table(report)
    rows = {(row["subject"], row["routes"]): row for row in report["rows"]}
    assert [key for key in rows if key[0] == "tensorrt"] == [("tensorrt", name) for name in ("dense", "222", "mixed")]
    assert {"dpn_rt dense", "dpn_rt mixed"} <= set(rows["tensorrt", "mixed"]["ratios"])
    assert rows["tensorrt", "mixed"]["ratios"]["flop saving realised"]["prefill"]["median"] > 0
    assert "prefill / dpn_rt" in capsys.readouterr().out
