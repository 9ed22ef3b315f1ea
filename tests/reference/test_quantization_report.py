"""`python -m dpn_rt.build --quantize ... --report FILE`: how far each layer is from the checkpoint's."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt import build as command
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.weights.fp8 import Fp8Weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.quantization_report import quantization_report
from tests.builders.huggingface_checkpoint import edit_config, save_model
from tests.hr_cases import hr_case
from tests.model.llava_checkpoints import save_checkpoint
from tests.model.test_anyres_parity import save_anyres
from tests.model.weights.test_quantized import stored_values

CHECKPOINT = Path("examples/tiny_dpn/checkpoint")


def report_of(checkpoint: Path, output: Path, quantize: str) -> dict[str, Any]:
    file = output.with_suffix(".json")
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), "--quantize", quantize]
    assert command.main([*arguments, "--dtype", "float32", "--report", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_quantised_layer_of_the_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(CHECKPOINT, tmp_path / "engine", "int4")
    stored = EngineDir.open(tmp_path / "engine").load_weights()
    layers = {layer["module"]: layer for layer in report["layers"]}
    quantised = {name.rpartition(".")[0] for name in stored if name.endswith((".int8", ".int4"))}
    assert set(layers) == quantised - {"embed_tokens"}, "the table is looked up, not multiplied"
    assert report["unmeasured"] == ["embed_tokens"]
    errors = [layer["error"] for layer in report["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert all(0 < layer["error"] < (0.12 if layer["bits"] == 4 else 0.02) for layer in report["layers"])
    assert {layer["bits"] for layer in report["layers"]} == {4, 8} and layers["lm_head"]["bits"] == 8
    assert (report["quantize"], report["prompts"], report["images"]) == ("int4", 4, 4)
    worst = report["layers"][0]
    line = f"{len(layers)} layers, at most {worst['error']:.1%} off ({worst['module']})"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_errors_are_those_of_the_stored_weights(tmp_path: Path, quantize: str) -> None:
    """Without a tokenizer too. Rows in 8 bits are a small part of the error of weights in 4."""
    save_model(tmp_path / "checkpoint")
    report = report_of(tmp_path / "checkpoint", tmp_path / "engine", quantize)
    stored = EngineDir.open(tmp_path / "engine").load_weights()
    dense = EagerDpn.from_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    weights = dict(dense.canonical_weights())
    for layer in report["layers"]:
        eight = Fp8Weight if quantize == "fp8" else Int8Weight
        form = eight if layer["bits"] == 8 else Int4Weight
        exact = weights[f"{layer['module']}.weight"]
        parts = {name: stored[f"{layer['module']}.{name}"] for name in (form.suffix, "scale")}
        values = stored_values(form, parts)[: exact.shape[0], : exact.shape[1]]
        weight_error = float((values - exact).norm() / exact.norm())
        assert 0.3 * weight_error < layer["error"] < 3 * weight_error + 0.02


def test_pictures_of_a_model_that_needs_no_settings_for_them(tmp_path: Path) -> None:
    """LLaVA-HR: the linear layers of its tower are measured too; adapters multiply by convolutions there."""
    report = report_of(hr_case("e01").write_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine", "int8")
    assert report["images"] == 4
    measured = {layer["module"] for layer in report["layers"]}
    assert {
        "projector.0",
        "vision.layers.0.qkv",
        "vision.slow.stages.0.blocks.0.fc1",
        "vision.mix.fast_proj",
    } <= measured
    assert all(module.startswith("vision.adapters.") for module in report["unmeasured"])


def test_a_damaged_layer_is_the_first(tmp_path: Path) -> None:
    report_of(CHECKPOINT, tmp_path / "engine", "int8")
    engine = EngineDir.open(tmp_path / "engine")
    model = EagerDpn.from_checkpoint(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("language_model.layers.3.mlp.down_proj.weight").mul_(2)
    worst = quantization_report(model, engine)["layers"][0]
    assert worst["module"] == "layers.3.down" and worst["error"] == pytest.approx(0.5, abs=0.01)


def test_what_is_not_quantised_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(CHECKPOINT), "--output", str(tmp_path / "engine")]
    for options in ([], ["--quantize", "none"]):
        assert command.main([*arguments, *options, "--report", str(tmp_path / "r.json")]) == 1
        assert "no layer of this engine is quantised, expected --quantize int8," in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "it is told before anything is built"
    missing = tmp_path / "missing" / "r.json"
    assert command.main([*arguments, "--quantize", "int8", "--report", str(missing)]) == 1
    assert f"{missing.parent}: not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("folder", "folder: cannot be written there: expected a regular file"),
        ("engine", "is within --output "),
        ("engine/r.json", "is within --output "),
        ("link/r.json", "is within --output "),
    ],
)
def test_a_report_that_could_not_be_written_is_told_before_the_build(
    report: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the engine it would be a file that is not the engine's, and the next build would not replace that."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "link").symlink_to("engine")
    arguments = ["--checkpoint", str(CHECKPOINT), "--output", str(tmp_path / "engine"), "--quantize", "int8"]
    assert command.main([*arguments, "--report", str(tmp_path / report)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and not any((tmp_path / "engine").iterdir())


def test_a_report_does_not_replace_a_part_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor of one whose files are links, as those of a cache are."""
    (tmp_path / "blob").write_text("weights")
    for option in ("--checkpoint", "--vision-tower"):
        directory = tmp_path / option
        directory.mkdir()
        (directory / "model.safetensors").symlink_to("../blob")
        (tmp_path / f"link{option}").symlink_to(directory / "config.json")
        (directory / "config.json").write_text("{}")
        others = {"--checkpoint": str(CHECKPOINT), "--output": str(tmp_path / "engine"), "--quantize": "int8"}
        for report in (directory / "model.safetensors", directory / "new.json", tmp_path / f"link{option}"):
            arguments = [part for pair in (others | {option: str(directory)}).items() for part in pair]
            assert command.main([*arguments, "--report", str(report)]) == 1
            assert f"is within {option} {directory}, expected a place beside it" in capsys.readouterr().err
        assert (directory / "config.json").read_text() == "{}" and (directory / "model.safetensors").is_symlink()
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_images_in_tiles_are_left_out(tmp_path: Path, kind: str) -> None:
    save_anyres(tmp_path / "checkpoint", kind)
    report = report_of(tmp_path / "checkpoint", tmp_path / "engine", "int8")
    measured = {layer["module"] for layer in report["layers"]}
    assert {"layers.0.qkv", "layers.0.down"} <= measured and report["images"] == 0
    assert {"projector.0", "vision.layers.0.qkv"} <= set(report["unmeasured"])


def test_prompts_that_are_too_long_for_a_model_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "checkpoint", max_positions=32)
    assert report_of(tmp_path / "checkpoint", tmp_path / "engine", "int8")["prompts"] == 2
    save_model(tmp_path / "short", max_positions=16)
    with_report = ["--checkpoint", str(tmp_path / "short"), "--quantize", "int8", "--report", str(tmp_path / "r.json")]
    assert command.main([*with_report, "--output", str(tmp_path / "built")]) == 1
    said = f"error: {tmp_path / 'built'} is built, without its report: prompt has 22 rows"
    assert said in capsys.readouterr().err
    EngineDir.open(tmp_path / "built")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_tower_without_layers(tmp_path: Path, tower: str) -> None:
    """The first hidden states are asked for."""
    save_checkpoint(tmp_path / "checkpoint", tied=False, kv_heads=4, old_names=False, tower=tower)
    edit_config(tmp_path / "checkpoint", vision_feature_layer=0)
    report = report_of(tmp_path / "checkpoint", tmp_path / "engine", "int8")
    assert {"projector.0", "layers.0.qkv"} <= {layer["module"] for layer in report["layers"]}


def test_a_full_disk_leaves_the_earlier_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(path: Path, data: bytes) -> None:
        is_report = path.name in ("r.json", ".r.json.partial")
        with path.open("wb") as file:
            file.write(data[:10] if is_report else data)
        if is_report:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: write_bytes(path, text.encode()))
    report = tmp_path / "r.json"
    with report.open("w") as file:
        file.write("earlier")
    arguments = ["--checkpoint", str(CHECKPOINT), "--output", str(tmp_path / "engine"), "--quantize", "int8"]
    assert command.main([*arguments, "--report", str(report)]) == 1
    reason = f"{report}: cannot be written: {os.strerror(errno.ENOSPC)}"
    assert f"error: {tmp_path / 'engine'} is built, without its report: {reason}" in capsys.readouterr().err
    assert report.read_text() == "earlier" and sorted(tmp_path.iterdir()) == [tmp_path / "engine", report]
