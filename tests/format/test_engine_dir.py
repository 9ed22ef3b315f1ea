"""The engine directory: it is read as it was written, it is complete or absent, and errors name the damage."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format import weight_file
from dpn_rt.format.atomic_dir import replaced_directory, settle
from dpn_rt.format.config import ModelConfig, PromptConfig
from dpn_rt.format.engine_dir import EngineDir, EngineSource, is_engine, weight_spec, write_engine
from dpn_rt.format.weight_file import map_weights, write_weights
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.schema.json_values import from_json, to_json
from dpn_rt.schema.weights import WeightSpec

SOURCE = EngineSource("0" * 64, "synthetic")
MODEL = ModelConfig(
    dtype="bfloat16",
    decoder=DecoderConfig(20, 16, 24, 3, 2, 1, 8, 1e-5, RopeConfig(1e4), 128, False, True, True),
    reduction=PoolingConfig((BoundaryConfig(0, ((1, 1), (1, 2), (2, 2))),), pooling_function="conv"),
    prompt=PromptConfig("vicuna_v1", "pad", 1, (2,), None, None, False, False),
    vision=ClipConfig(8, 12, 1, 1, 28, 7, 1e-5, "quick_gelu", "patch"),
    projector=ProjectorConfig("mlp2x_gelu", 8),
)


def random_weights(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    return {name: torch.randn(spec.shape).to(spec.dtype) for name, spec in weight_spec(model).items()}


@pytest.fixture
def engine(tmp_path: Path) -> EngineDir:
    return write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items(), {"a.json": b"{}"})


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


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
        (lambda p: (p / "engine.json").write_text("[]"), "engine format version None; this version reads 5 and 6"),
        (lambda p: edit_manifest(p, format_version=1), "engine format version 1; this version reads 5 and 6"),
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


def test_existing_engine_needs_force(engine: EngineDir) -> None:
    before = (engine.path / "engine.json").read_bytes()
    with pytest.raises(EngineError, match="--force"):
        write_engine(engine.path, MODEL, SOURCE, random_weights().items())
    assert (engine.path / "engine.json").read_bytes() == before
    write_engine(engine.path, MODEL, SOURCE, random_weights().items(), force=True)
    assert names(engine.path) == ["engine.json", "weights.safetensors"]
    assert names(engine.path.parent) == ["engine"]


@pytest.mark.parametrize("force", [False, True])
def test_other_peoples_files_are_never_replaced(engine: EngineDir, force: bool) -> None:
    (engine.path / "notes.txt").write_text("mine")
    (engine.path.parent / "file").write_text("mine")
    (engine.path.parent / "directory" / "photos").mkdir(parents=True)
    (engine.path.parent / "directory" / "photos" / "cat.png").write_text("mine")
    assert not is_engine(engine.path)
    for name in ("engine", "directory"):
        with pytest.raises(EngineError, match="they are not replaced"):
            write_engine(engine.path.parent / name, MODEL, SOURCE, random_weights().items(), force=force)
    with pytest.raises(EngineError, match="is not a directory"):
        write_engine(engine.path.parent / "file", MODEL, SOURCE, random_weights().items(), force=force)
    assert (engine.path / "notes.txt").read_text() == "mine"
    assert names(engine.path.parent) == ["directory", "engine", "file"]


def test_empty_directory_and_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write_engine(tmp_path / "link", MODEL, SOURCE, random_weights().items())
    write_engine(tmp_path / "link", MODEL, SOURCE, random_weights().items(), force=True)
    assert (tmp_path / "link").is_symlink()
    EngineDir.open(tmp_path / "empty")
    assert names(tmp_path) == ["empty", "link"]


def write_into(path: Path, force: bool = True) -> None:
    write_engine(path, MODEL, SOURCE, random_weights().items(), {"a.json": b"{}"}, force=force)


@pytest.mark.parametrize("place", [".", "../here", "link", "absolute"])
def test_the_working_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    here = tmp_path / "here"
    here.mkdir(mode=0o750)
    (here.parent / "link").symlink_to(here)
    monkeypatch.chdir(here)
    output = {"link": here.parent / "link", "absolute": here}.get(place, Path(place))
    inode = here.stat().st_ino
    for force in (False, True, True):
        write_into(output, force)
        assert names(Path()) == ["engine.json", "processor", "weights.safetensors"]
        assert (here.stat().st_ino, Path.cwd().stat().st_ino, here.stat().st_mode & 0o777) == (inode, inode, 0o750)
        EngineDir.open(Path())
    assert names(tmp_path) == ["here", "link"]


def test_a_working_directory_inside_the_engine_stays(engine: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine.path / "processor")
    write_into(Path(".."))
    assert names(Path()) == ["a.json"]
    write_engine(Path(".."), MODEL, SOURCE, random_weights().items(), force=True)
    assert names(Path()) == []
    EngineDir.open(engine.path)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES], ids=["mount point", "other disk", "parent"])
def test_a_directory_that_cannot_be_renamed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A mount point, an overlay's layer, a directory whose parents belong to root: only what is below it may change."""
    target = tmp_path / "engine"
    (target / "lost+found").mkdir(parents=True)

    def checked(do: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Path, *arguments: Any, **options: Any) -> Any:
            places = [self, *(a for a in arguments if isinstance(a, Path))]
            if any(not place.is_relative_to(target) or place == target for place in places) and not (
                do is mkdir and self.is_dir()
            ):
                raise OSError(code, os.strerror(code))
            return do(self, *arguments, **options)

        return run

    rename, mkdir, rmdir = Path.rename, Path.mkdir, Path.rmdir
    for name, do in (("rename", rename), ("mkdir", mkdir), ("rmdir", rmdir)):
        monkeypatch.setattr(Path, name, checked(do))
    for force in (False, True):
        write_into(target, force)
        EngineDir.open(target)
        assert names(target) == ["engine.json", "lost+found", "processor", "weights.safetensors"]


def test_files_that_appear_during_a_build_are_kept(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        yield from random_weights().items()
        (tmp_path / "engine" / "notes.txt").write_text("mine")

    with pytest.raises(EngineError, match="files have appeared there meanwhile"):
        write_engine(tmp_path / "engine", MODEL, SOURCE, slowly())
    assert names(tmp_path / "engine") == ["notes.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "No space")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, failure: BaseException, exists: bool) -> None:
    if exists:
        write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        for position, item in enumerate(random_weights().items()):
            if position == 5:
                raise failure
            yield item

    wanted, message = (EngineError, "disk is full") if isinstance(failure, OSError) else (type(failure), None)
    with pytest.raises(wanted, match=message):
        write_engine(tmp_path / "engine", MODEL, SOURCE, failing(), force=True)
    assert names(tmp_path) == (["engine"] if exists else [])
    if exists:
        EngineDir.open(tmp_path / "engine")


def moves_of_a_swap() -> range:
    """Renames of a build that replaces an engine of three files by one of two: out, the name, in."""
    return range(3 + 1 + 2)


@pytest.mark.parametrize("number", moves_of_a_swap())
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EACCES, "no")])
def test_failure_while_swapping_keeps_the_old_engine(
    engine: EngineDir, monkeypatch: pytest.MonkeyPatch, number: int, failure: BaseException
) -> None:
    before = contents(engine.path)
    rename, count = Path.rename, iter(range(100))

    def failing(self: Path, target: Path) -> Path:
        if next(count) == number:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EngineError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_engine(engine.path, MODEL, SOURCE, random_weights().items(), force=True)
    EngineDir.open(engine.path)
    assert contents(engine.path) == before
    assert names(engine.path.parent) == ["engine"]


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from dpn_rt.format.atomic_dir import replaced_directory\n"
        "with replaced_directory(Path(sys.argv[1]), 0, False, 'seal') as partial:\n"
        "    (partial / 'weights').write_bytes(b'1'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "engine")], check=False)
    left = names(tmp_path)
    assert len(left) == 1 and left[0].endswith(".partial")
    write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())
    assert names(tmp_path) == ["engine"]
    (tmp_path / "empty").mkdir()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "empty")], check=False)
    assert len(names(tmp_path / "empty")) == 1
    write_engine(tmp_path / "empty", MODEL, SOURCE, random_weights().items())
    assert names(tmp_path / "empty") == ["engine.json", "weights.safetensors"]


KILLED_WHILE_SWAPPING = """
import os, signal, sys
from pathlib import Path
from dpn_rt.format import swapped_files
from dpn_rt.format.atomic_dir import replaced_directory
rename, rmtree, number = Path.rename, swapped_files.shutil.rmtree, int(sys.argv[2])
count = iter(range(100))
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def killed(self, target):
    if next(count) == number:
        kill()
    return rename(self, target)
Path.rename = killed
swapped_files.shutil.rmtree = lambda path, **options: kill()
with replaced_directory(Path(sys.argv[1]), 0, True, "engine.json") as partial:
    (partial / "engine.json").write_bytes(b"new")
    (partial / "weights").write_bytes(b"1")
"""


@pytest.mark.parametrize("number", moves_of_a_swap())
def test_what_a_build_killed_while_swapping_left_is_one_whole_engine(engine: EngineDir, number: int) -> None:
    """The old one while its files move out; the new one, which is complete, from then on."""
    before = contents(engine.path)
    subprocess.run([sys.executable, "-c", KILLED_WHILE_SWAPPING, str(engine.path), str(number)], check=False)
    assert any(name.startswith(".") for name in names(engine.path))
    if not (engine.path / "engine.json").exists():
        with pytest.raises(EngineError, match=r"a build was killed there: build again, or move the files of .*\.reti"):
            EngineDir.open(engine.path)
    settle(engine.path, "engine.json")
    assert contents(engine.path) == (before if number < 4 else {"engine.json": b"new", "weights": b"1"})
    assert names(engine.path.parent) == ["engine"]
    settle(engine.path, "engine.json")
    if number < 4:
        EngineDir.open(engine.path)
        with pytest.raises(EngineError, match="an engine exists there"):
            write_engine(engine.path, MODEL, SOURCE, random_weights().items())


def test_an_engine_that_a_killed_build_had_replaced_is_removed(engine: EngineDir) -> None:
    subprocess.run([sys.executable, "-c", KILLED_WHILE_SWAPPING, str(engine.path), "99"], check=False)
    assert len(names(engine.path)) == 4  # the new files, and the old ones
    settle(engine.path, "engine.json")
    assert names(engine.path) == ["engine.json", "weights"]


def test_what_a_build_that_still_runs_has_moved_aside_is_left_alone(engine: EngineDir) -> None:
    with replaced_directory(engine.path, 0, True, "engine.json") as running:
        (running.with_suffix(".retired")).mkdir()
        (running / "engine.json").write_text("new")
        before = names(engine.path)
        settle(engine.path, "engine.json")
        assert names(engine.path) == before
        running.with_suffix(".retired").rmdir()


def test_users_files_with_similar_names_are_left_alone(tmp_path: Path) -> None:
    for name in (".mine.partial", ".12345678.partials", "a.partial"):
        (tmp_path / "engine" / name).mkdir(parents=True)
    (tmp_path / "engine" / ".87654321.partial").write_text("a file")
    settle(tmp_path / "engine", "engine.json")
    assert len(names(tmp_path / "engine")) == 4


def test_a_build_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    with replaced_directory(tmp_path / "engine", 0, False, "engine.json") as other:
        write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())
        assert other.is_dir() and names(tmp_path) == sorted([other.name, "engine"])
        shutil.rmtree(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]


def test_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = dataclasses.make_dataclass("Usage", ["free"])(free=10)
    monkeypatch.setattr("dpn_rt.format.atomic_dir.shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(weight_file, "write_weights", None)
    with pytest.raises(EngineError, match="bytes are needed, the disk has 10 free"):
        write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items())
    assert names(tmp_path) == []


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
