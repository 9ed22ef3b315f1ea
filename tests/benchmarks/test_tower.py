"""The benchmarks of LLaVA-HR: what they count and report. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import large_build, latency, tower
from benchmarks.models.shapes import SHAPES
from benchmarks.op_cases.convolution import convolution_cases
from dpn_rt.format import flops
from dpn_rt.model.vision.hr.config import HrConfig

HR = [name for name, shape in SHAPES.items() if isinstance(shape.vision, HrConfig)]


@pytest.mark.parametrize("name", HR)
def test_the_limit_has_all_the_towers_flops(name: str) -> None:
    model = SHAPES[name].model("bfloat16")
    vision = model.vision
    assert isinstance(vision, HrConfig)
    for part, counted in (("slow", vision.slow.flops(vision.image_size)), ("tower", vision.flops_per_crop)):
        products = sum(product.flops for product in tower.products(vision, part))
        taps = sum(
            2 * 49 * side * side * channels * count for side, channels, count in tower.convolutions(vision, part)
        )
        assert products + taps == pytest.approx(counted, rel=1e-3)
    whole, parts = (list(tower.products(vision, part)) for part in ("tower", "slow"))
    assert whole == [*parts, *tower.products(vision, "fast and mix")]


def test_tower_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tower.json"
    tower.main(["--shape", "tiny-hr", "--dtype", "float32", "--repeats", "1", "--json", str(file)])
    report = json.loads(file.read_text())
    assert [(row["subject"], row["part"]) for row in report["rows"]] == [
        (subject, part) for subject in ("dpn_rt", *tower.LAYOUTS) for part in tower.PARTS
    ]
    assert all(row["seconds"]["median"] > 0 and row["of limit"]["median"] > 0 for row in report["rows"])
    assert all(("speedup" in row) == (row["subject"] == "dpn_rt") for row in report["rows"])
    printed = capsys.readouterr().out
    assert "fast and mix" in printed


def test_latency_of_a_tower_that_transformers_lacks(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    arguments = ["--shape", "tiny-hr", "--repeats", "1", "--tokens", "1", "--batch", "1", "--json", str(file)]
    latency.main(arguments)
    report = json.loads(file.read_text())
    assert {row["subject"] for row in report["rows"]} == {"eager", "dpn_rt"}
    model = SHAPES["tiny-hr"].model("bfloat16")
    (reduced,) = (row for row in report["rows"] if (row["subject"], row["routes"]) == ("dpn_rt", "222"))
    dense, vision = report["dense_prefill_flops"], flops.vision_flops(model)
    whole = reduced["ratios"]["dpn_rt dense"]["time_to_first_token"]["median"]
    expected = whole * (reduced["prefill_flops"] + vision) / (dense + vision)
    saving = reduced["ratios"]["flop saving realised"]["time_to_first_token"]["median"]
    assert saving == pytest.approx(expected)


def test_a_large_build_is_that_of_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "large"
    monkeypatch.setattr("sys.argv", ["large_build.py", "--shape", "tiny-hr", "--directory", str(folder)])
    large_build.main()
    assert "tiny-hr: engine of" in capsys.readouterr().out
    assert not folder.exists()


def test_convolution_cases_compute_the_same() -> None:
    case = convolution_cases(torch.float32)[-1]
    ours, in_torch = (run() for run in case.make())
    assert torch.allclose(ours, in_torch.permute(0, 2, 3, 1), atol=1e-4)
