"""LLaVA-HR checkpoints: spellings, sizes from shapes, and a message for every fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError, ConfigError, DpnError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.vision.hr.config import HrConfig, size_problem
from tests.hr_cases import HrCase, Weights, hr_case, write_checkpoint

TOWER = "model.vision_tower."
SLOW = f"{TOWER}slow_vision_tower.vision_tower."
FAST = f"{TOWER}fast_vision_tower.vision_tower.vision_model."
Change = Callable[[dict[str, Any], Weights], None]


def build(case: HrCase, directory: Path, change: Change = lambda config, weights: None, **options: Any) -> EngineDir:
    config, weights = case.published_config, case.original_weights()
    change(config, weights)
    path = write_checkpoint(directory / "checkpoint", config, weights)
    return build_engine(path, directory / "engine", **options)


def message_of(
    case: HrCase, directory: Path, change: Change, kind: type[DpnError] = CheckpointError, **options: Any
) -> str:
    with pytest.raises(kind) as info:
        build(case, directory, change, **options)
    assert not (directory / "engine").exists()
    message = str(info.value)
    assert "\n" not in message
    return message


def renamed(weights: Weights, rule: Callable[[str], str]) -> None:
    for name in list(weights):
        weights[rule(name)] = weights.pop(name)


# Spellings


def as_timm(name: str) -> str:
    return re.sub(r"(blocks\.\d+)\.weight$", r"\1.gamma", name)


def as_open_clip(name: str) -> str:
    return name.replace(SLOW, f"{SLOW}visual.trunk.")


@pytest.mark.parametrize("rules", [(as_timm,), (as_open_clip,), (as_timm, as_open_clip)])
@pytest.mark.parametrize("name", ["v03", "v05"])
def test_spellings(name: str, rules: tuple[Callable[[str], str], ...], tmp_path: Path) -> None:
    case = hr_case(name)

    def change(config: dict[str, Any], weights: Weights) -> None:
        for rule in rules:
            renamed(weights, rule)

    plain, spelled = build(case, tmp_path / "a"), build(case, tmp_path / "b", change)
    assert plain.files == spelled.files
    assert plain.model == spelled.model


def test_buffers_are_ignored(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        weights[f"{FAST}embeddings.position_ids"] = torch.arange(577).float()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    notes: list[str] = []
    build(hr_case("v03"), tmp_path, change, note=notes.append)
    assert not any("left out" in line for line in notes)


# What shapes and names tell


@pytest.mark.parametrize(
    ("name", "depths", "dims", "eps"),
    [("v01", (1, 1, 2, 1), (8, 16, 24, 40), 1e-6), ("v02", (1, 2, 3, 1), (8, 16, 24, 48), 1e-5)],
)
def test_the_slow_path(name: str, depths: tuple[int, ...], dims: tuple[int, ...], eps: float, tmp_path: Path) -> None:
    vision = build(hr_case(name), tmp_path).model.vision
    assert isinstance(vision, HrConfig)
    assert (vision.slow.depths, vision.slow.dims, vision.slow.layer_norm_eps) == (depths, dims, eps)


@pytest.mark.parametrize(("name", "native"), [("v01", 24), ("v06", 24), ("v07", 32), ("v03", 24)])
def test_positions_are_resized(name: str, native: int, tmp_path: Path) -> None:
    """Row 0, the class token's, is not part of the grid."""
    case = hr_case(name)
    engine = build(case, tmp_path)
    vision = engine.model.vision
    assert isinstance(vision, HrConfig)
    published = case.original_weights()[f"{FAST}embeddings.position_embedding.weight"][1:]
    grid = published.view(native, native, -1).permute(2, 0, 1).unsqueeze(0)
    if vision.fast.grid[0] != native:
        grid = functional.interpolate(grid, vision.fast.grid, mode="bicubic", antialias=True, align_corners=False)
    expected = grid[0].flatten(1).t()
    assert torch.equal(engine.load_weights()["vision.position_embedding.weight"], expected)


@pytest.mark.parametrize("size", [32, 64, 96, 128, 192, 256, 384, 768, 800, 1024, 1536, 2048])
def test_sizes_that_fit(size: int) -> None:
    assert size_problem(size) is None


@pytest.mark.parametrize("size", [160, 224, 320, 512, 640, 672, 736, 756, 770, 1000, 1025, 0, -1024, 31])
def test_sizes_that_do_not(size: int, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        config["input_image_size"] = size

    message = message_of(hr_case("v03"), tmp_path, change, ConfigError)
    assert f"images of {size} pixels" in message
    assert "multiple of 32 from 768 on" in message


def test_without_a_vision_config_the_fast_path_is_clip_l(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        del config["vision_config"]

    message = message_of(hr_case("v03"), tmp_path, change, ConfigError)
    assert "mm_hidden_size is 48, the vision tower's hidden size 1024" in message


@pytest.mark.parametrize("value", [None, "absent"])
def test_the_slow_family_is_needed(value: str | None, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        config["vision_tower_slow"] = None
        if value == "absent":
            del config["vision_tower_slow"]

    assert "vision_tower_slow is missing" in message_of(hr_case("v03"), tmp_path, change, ConfigError)


# Faults of the weights

PARTS = [
    f"{SLOW}stem.0.weight",
    f"{SLOW}stem.1.bias",
    f"{SLOW}stages.1.downsample.0.weight",
    f"{SLOW}stages.3.downsample.1.weight",
    f"{SLOW}stages.2.blocks.1.weight",
    f"{SLOW}stages.0.blocks.0.conv_dw.weight",
    f"{SLOW}stages.3.blocks.0.mlp.fc2.bias",
    f"{FAST}embeddings.patch_embedding.weight",
    f"{FAST}embeddings.position_embedding.weight",
    f"{FAST}encoder.layers.3.mlp.fc1.weight",
    f"{TOWER}align_stages_latent.1.slow_conv.weight",
    f"{TOWER}align_stages_latent.2.gate.2.bias",
    f"{TOWER}align_stages.0.slow_proj.weight",
    "model.mm_projector.2.bias",
    "model.layers.1.mlp.up_proj.weight",
]


def test_every_missing_weight_is_named(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        for name in PARTS:
            del weights[name]

    message = message_of(hr_case("v03"), tmp_path, change)
    listed = message.partition("missing: ")[2].split(", ")
    assert sorted(listed) == sorted(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_a_wrong_shape_is_named(name: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        shape = weights[name].shape
        weights[name] = torch.zeros(*shape[:-1], shape[-1] + 1)

    message = message_of(hr_case("v03"), tmp_path, change)
    assert f"{name} (expected [" in message


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(name: str, value: float, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        weights[name].view(-1)[-1] = value

    assert f"{name}: holds infinite values or NaN" in message_of(hr_case("v03"), tmp_path, change)


def test_adapters_are_needed_unless_the_tower_was_frozen(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        for name in [name for name in weights if "align_stages_latent" in name]:
            del weights[name]

    message = message_of(hr_case("v03"), tmp_path / "a", change)
    assert message.count("align_stages_latent.") == 3 * 12

    def change_both(config: dict[str, Any], weights: Weights) -> None:
        change(config, weights)
        config["freeze_vision"] = True

    vision = build(hr_case("v03"), tmp_path / "b", change_both).model.vision
    assert isinstance(vision, HrConfig)
    assert not vision.has_adapters


def test_a_frozen_tower_has_no_adapters(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        config["freeze_vision"] = True

    notes: list[str] = []
    vision = build(hr_case("v03"), tmp_path, change, note=notes.append).model.vision
    assert isinstance(vision, HrConfig)
    assert not vision.has_adapters
    assert any("freeze_vision is true" in line and "36 weights" in line for line in notes)


@pytest.mark.parametrize(("missing", "named"), [((SLOW,), ["slow path"]), ((FAST,), ["fast path"]), ((SLOW, FAST), [])])
def test_towers_are_never_fetched(missing: tuple[str, ...], named: list[str], tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(missing)]:
            del weights[name]

    message = message_of(hr_case("v03"), tmp_path, change)
    for text in named or ["slow path", "fast path"]:
        assert text in message
    assert "expected a checkpoint that holds the whole model" in message


@pytest.mark.parametrize(
    "extra",
    [
        f"{FAST}encoder.layers.4.mlp.fc1.weight",
        f"{TOWER}align_stages_latent.3.gate.0.weight",
        f"{SLOW}stages.1.downsample.2.weight",
    ],
)
def test_weights_without_a_place(extra: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        weights[extra] = torch.zeros(4, 4)

    message = message_of(hr_case("v03"), tmp_path, change)
    assert extra in message.partition("unexpected")[2]


@pytest.mark.parametrize("num_layers", [3, 5, 6, 0])
def test_the_fast_path_has_four_quarters(num_layers: int, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        config["vision_config"]["num_hidden_layers"] = num_layers

    message = message_of(hr_case("v03"), tmp_path, change, ConfigError)
    assert str(num_layers) in message


def test_a_block_in_the_middle_is_missing(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        for name in [name for name in weights if f"{SLOW}stages.2.blocks.0." in name]:
            del weights[name]

    message = message_of(hr_case("v03"), tmp_path, change)
    assert message.count("stages.2.blocks.0.") == 9


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_without_blocks(stage: int, tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        for name in [name for name in weights if f"{SLOW}stages.{stage}.blocks." in name]:
            del weights[name]

    assert f"missing: {SLOW}stages.{stage}.blocks.*" in message_of(hr_case("v03"), tmp_path, change)


def test_a_fifth_stage(tmp_path: Path) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        weights[f"{SLOW}stages.4.blocks.0.weight"] = torch.zeros(40)

    assert "blocks in stages [0, 1, 2, 3, 4]" in message_of(hr_case("v03"), tmp_path, change)


def released(weights: Weights, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """The names and channels of a published slow path, which are all that its depths are told by."""
    for name in [name for name in weights if name.startswith(SLOW)]:
        del weights[name]
    weights[f"{SLOW}stem.0.weight"] = torch.zeros(dims[0], 3, 4, 4)
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            weights[f"{SLOW}stages.{stage}.downsample.1.bias"] = torch.zeros(dim)
        for block in range(depth):
            weights[f"{SLOW}stages.{stage}.blocks.{block}.weight"] = torch.zeros(dim)


@pytest.mark.parametrize(
    ("name", "depths", "dims", "message"),
    [
        ("v03", (3, 3, 26, 3), (192, 384, 768, 1536), "[3, 3, 26, 3] blocks, a convnext_large has [3, 3, 27, 3]"),
        ("v05", (3, 3, 27, 3), (384, 768, 1536, 3072), "a convnext_xxlarge has [3, 4, 30, 3]"),
        ("v05", (3, 3, 27, 3), (192, 384, 768, 1536), "names a convnext_xxlarge, but the weights have the channels"),
        ("v03", (3, 4, 30, 3), (384, 768, 1536, 3072), "names a convnext_large, but the weights have the channels"),
    ],
)
def test_wrong_depths_of_a_published_network(
    name: str, depths: tuple[int, ...], dims: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    def change(config: dict[str, Any], weights: Weights) -> None:
        released(weights, depths, dims)

    assert message in message_of(hr_case(name), tmp_path, change, DpnError)


# Other files and options


@pytest.mark.parametrize("pretrained", ["mm_projector.bin", "model.safetensors"])
def test_the_result_of_stage_1_is_refused(pretrained: str, tmp_path: Path) -> None:
    case = hr_case("v04")
    names = ("model.mm_projector.", f"{TOWER}align_stages.0.")
    weights = {name: weight for name, weight in case.original_weights().items() if name.startswith(names)}
    path = write_checkpoint(tmp_path / "c", case.published_config, weights)
    if pretrained != "model.safetensors":
        (path / "model.safetensors").unlink()
        torch.save(weights, path / pretrained)
    with pytest.raises(CheckpointError, match="projector only"):
        build_engine(path, tmp_path / "e")


def test_a_tower_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    message = message_of(hr_case("v03"), tmp_path, lambda config, weights: None, vision_tower=tmp_path / "tower")
    assert "holds its own tower" in message


def test_without_the_flag_it_is_plain_llava(tmp_path: Path) -> None:
    """Its CLIP then runs as LLaVA's, without the other path."""

    def change(config: dict[str, Any], weights: Weights) -> None:
        config["is_multipath_encoder"] = False

    engine = build(hr_case("v03"), tmp_path, change)
    assert engine.model.vision is not None
    assert engine.model.vision.type == "clip"


@pytest.mark.parametrize("name", ["v01", "e04"])
def test_equal_checkpoints_make_equal_engines(name: str, tmp_path: Path) -> None:
    case = hr_case(name)
    build(case, tmp_path / "a")
    build(case, tmp_path / "b")
    for file in ("engine.json", "weights.safetensors"):
        assert (tmp_path / "a/engine" / file).read_bytes() == (tmp_path / "b/engine" / file).read_bytes()
    manifest = json.loads((tmp_path / "a/engine/engine.json").read_text())
    assert manifest["model"]["vision"]["type"] == "llava_hr"
    assert not (tmp_path / "a/engine/processor").exists()
