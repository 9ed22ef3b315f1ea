"""The engine directory: it is read as it was written, and errors name the damage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir, weight_spec, write_engine
from dpn_rt.format.weight_file import map_weights, write_weights
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.schema.json_values import from_json, to_json
from dpn_rt.schema.weights import WeightSpec
from tests.format.engines import MODEL, SOURCE, names, random_weights


def test_round_trip(tmp_path: Path) -> None:
    weights = random_weights()
    written = []
    write_engine(tmp_path / "engine", MODEL, SOURCE, weights.items(), {"a.json": b"{}"}, progress=written.append)
    engine = EngineDir.open(tmp_path / "engine")
    assert (engine.model, engine.source) == (MODEL, SOURCE)
    assert (engine.processor_path / "a.json").read_bytes() == b"{}"
    assert sum(written) == sum(spec.num_bytes for spec in weight_spec(MODEL).values())
    loaded, by_library = engine.load_weights(), load_file(engine.path / "weights.safetensors")
    assert list(loaded) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(by_library[name], tensor)
    assert names(tmp_path) == ["engine"]


def test_writing_to_a_loaded_weight_leaves_the_file_alone(engine: EngineDir) -> None:
    engine.load_weights()["norm.weight"].fill_(7)
    EngineDir.open(engine.path)


def test_tensors_of_whole_cache_lines_are_aligned(engine: EngineDir) -> None:
    for name, tensor in engine.load_weights().items():
        size = weight_spec(MODEL)[name].num_bytes
        power = size & -size
        assert tensor.data_ptr() % min(power, 64) == 0, name


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_weights_survive(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype
) -> None:
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    spec = {f"w{i}": WeightSpec(tuple(shape), dtype) for i, shape in enumerate(shapes)}
    weights = {name: torch.randn(weight.shape).to(dtype) for name, weight in spec.items()}
    write_weights(file, spec, weights.items(), lambda _: None)
    loaded = map_weights(file, spec)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@settings(max_examples=50, deadline=None)
@given(model=st.builds(dataclasses.replace, st.just(MODEL), dtype=st.sampled_from(["float32", "float16"])))
def test_configuration_survives_json(model: ModelConfig) -> None:
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(model)))) == model


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    weights = random_weights()
    first, second = (write_engine(tmp_path / name, MODEL, SOURCE, weights.items(), {"a": b"1"}) for name in "ab")
    for file in ("engine.json", "weights.safetensors", "processor/a"):
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "is out of place: the engine's weight list has norm.weight here"),
        (lambda w: w.popitem(), "weights are missing: "),
        (
            lambda w: w.update(extra=torch.zeros(1)),
            "extra is out of place: the engine's weight list has no further weight",
        ),
        (
            lambda w: w.update({"norm.weight": torch.zeros(3)}),
            r"norm.weight: expected \[16\] bfloat16, got \[3\] float32",
        ),
    ],
)
def test_wrong_weights_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    weights = random_weights()
    change(weights)
    with pytest.raises(EngineError, match=message):
        write_engine(tmp_path / "engine", MODEL, SOURCE, weights.items())
    assert names(tmp_path) == []


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "engine.json").read_text())
    (path / "engine.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("version", [5, 6])
def test_engines_from_before_a_field_was_there_mean_its_default(engine: EngineDir, version: int) -> None:
    manifest = json.loads((engine.path / "engine.json").read_text())
    decoder = manifest["model"]["decoder"]
    assert (decoder.pop("windows"), decoder.pop("qk_norm")) == ([], False)
    edit_manifest(engine.path, model=manifest["model"], format_version=version)
    assert EngineDir.open(engine.path).model == engine.model
    del decoder["o_bias"]
    edit_manifest(engine.path, model=manifest["model"])
    with pytest.raises(EngineError, match=r"model.decoder: missing keys \['o_bias'\]"):
        EngineDir.open(engine.path)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([9, 9], "windows has 2 entries, expected none or one for each of 3 layers"),
        ([9, 0, None], r"decoder.windows\[1\] must be positive, got 0"),
        ([9, "9", None], r"decoder.windows\[1\]: expected int, got '9'"),
        ([9, 2**30, None], r"decoder.windows\[1\] must be at most 16777216"),
        (9, "decoder.windows: expected a list, got 9"),
    ],
)
def test_windows_that_cannot_be(engine: EngineDir, windows: object, message: str) -> None:
    manifest = json.loads((engine.path / "engine.json").read_text())
    manifest["model"]["decoder"]["windows"] = windows
    edit_manifest(engine.path, model=manifest["model"])
    with pytest.raises(EngineError, match=message):
        EngineDir.open(engine.path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "engine.json").unlink(), "not an engine directory: engine.json: No such file"),
        (lambda p: (p / "engine.json").write_text("{"), "engine.json: not JSON"),
        (lambda p: (p / "engine.json").write_text("[" * 100_000), "engine.json: not JSON"),
        (lambda p: (p / "engine.json").write_text("[]"), "engine format version None, expected 5 or 6: build"),
        (lambda p: edit_manifest(p, format_version=1), "engine format version 1, expected 5 or 6: build"),
        (lambda p: edit_manifest(p, format_version=True), "engine format version True"),
        (lambda p: edit_manifest(p, extra=1), "expected the keys"),
        (lambda p: edit_manifest(p, model={}), "model: missing keys"),
        (lambda p: edit_manifest(p, files={}), "files: weights.safetensors is missing"),
        (
            lambda p: edit_manifest(p, files={"../x": {"sha256": "", "bytes": 1}}),
            "file name '../x' leaves the engine directory",
        ),
        (lambda p: (p / "processor" / "a.json").unlink(), "a.json: missing, but engine.json lists it"),
        (lambda p: (p / "weights.safetensors").write_bytes(b"1234"), "expected .* bytes, the file has 4"),
        (lambda p: flip_last_byte(p / "weights.safetensors"), "weights.safetensors: expected sha256 .*, got"),
        (lambda p: flip_last_byte(p / "processor" / "a.json"), "a.json: expected sha256"),
        (lambda p: lengthen_sha256(p, "weights.safetensors"), r"expected sha256 '[0-9a-f]+\.\.\., got [0-9a-f]{64}"),
    ],
)
def test_damage_has_a_name(engine: EngineDir, damage: Callable[[Path], None], message: str) -> None:
    damage(engine.path)
    with pytest.raises(EngineError, match=message):
        EngineDir.open(engine.path)


def lengthen_sha256(path: Path, name: str) -> None:
    files = json.loads((path / "engine.json").read_text())["files"]
    files[name]["sha256"] *= 1000
    edit_manifest(path, files=files)


def test_verification_can_be_skipped(engine: EngineDir) -> None:
    flip_last_byte(engine.path / "weights.safetensors")
    EngineDir.open(engine.path, verify=False).load_weights()


def rewrite_weights(path: Path, spec: dict[str, WeightSpec]) -> None:
    """Replaces the weights by others and makes the manifest agree in size and hash."""
    tensors = ((name, torch.zeros(weight.shape, dtype=weight.dtype)) for name, weight in spec.items())
    sha256 = write_weights(path / "weights.safetensors", spec, tensors, lambda _: None)
    record = {"sha256": sha256, "bytes": (path / "weights.safetensors").stat().st_size}
    edit_manifest(path, files={"weights.safetensors": record})


def test_weights_that_were_replaced_are_not_loaded(engine: EngineDir) -> None:
    """The manifest in memory is not theirs, although all names, shapes and the size are the same."""
    opened = EngineDir.open(engine.path)
    write_engine(engine.path, MODEL, SOURCE, random_weights().items(), {"a.json": b"{}"}, force=True)
    with pytest.raises(EngineError, match="weights.safetensors is another file than when the engine was opened"):
        opened.load_weights()
    EngineDir.open(engine.path).load_weights()


def test_weights_that_are_not_the_models_are_all_named(engine: EngineDir) -> None:
    spec = dict(weight_spec(MODEL))
    spec["more.weight"] = spec.pop("norm.weight")
    spec["lm_head.weight"] = WeightSpec((3, 16), torch.float32)
    rewrite_weights(engine.path, spec)
    message = (
        r"norm.weight is missing; more.weight is unexpected; "
        r"lm_head.weight: expected \[20, 16\] bfloat16, got \[3, 16\] float32"
    )
    with pytest.raises(EngineError, match=message):
        EngineDir.open(engine.path)


def test_weights_in_another_order_are_refused(engine: EngineDir) -> None:
    rewrite_weights(engine.path, dict(reversed(weight_spec(MODEL).items())))
    with pytest.raises(EngineError, match="expected bytes 0 to"):
        EngineDir.open(engine.path)


def test_header_length_beyond_the_file(engine: EngineDir) -> None:
    file = engine.path / "weights.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(EngineError, match=r"header of \d+ bytes in a file of"):
        EngineDir.open(engine.path, verify=False)


BOUNDARY = BoundaryConfig(0, ((1, 1), (2, 2)))


@pytest.mark.parametrize(
    ("pyramid", "message"),
    [
        (
            {"boundaries": (BoundaryConfig(3, BOUNDARY.kernels),)},
            "pooling layer 3 does not exist: the decoder has layers 0",
        ),
        ({"boundaries": (BoundaryConfig(2, BOUNDARY.kernels),)}, "pooling layer 2 is the last layer"),
        ({"boundaries": (BOUNDARY, BOUNDARY)}, r"must rise without repetition, got \[0, 0\]"),
        ({"boundaries": (BoundaryConfig(1, ((1, 1),)), BOUNDARY)}, r"must rise without repetition, got \[1, 0\]"),
        ({"boundaries": (BoundaryConfig(0, ()),)}, "pooling layer 0 has no kernels"),
        ({"boundaries": (BoundaryConfig(0, ((0, 2),)),)}, r"kernels\[0\]\[0\] must be positive, got 0"),
        (
            {"boundaries": (BoundaryConfig(0, ((1, 1), (5, 1))),)},
            r"kernel \[5, 1\] does not fit the visual grid \(4x4\)",
        ),
        ({"boundaries": (BOUNDARY,), "pooling_type": "static"}, "static pooling has one kernel"),
        ({"boundaries": (BOUNDARY,), "use_router_token": True}, "the model has no router_token_id"),
    ],
)
def test_pyramids_that_cannot_be(pyramid: dict[str, object], message: str) -> None:
    model = dataclasses.replace(MODEL, reduction=PoolingConfig(**pyramid))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        write_engine("/nonexistent", model, SOURCE, [])
