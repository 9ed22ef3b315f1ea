"""Every number of engine.json has bounds, and is checked before anything is computed with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpn_rt.backends.kernels import loading
from dpn_rt.errors import CapacityError, EngineError
from dpn_rt.format.engine_dir import MAX_FILES, EngineDir, write_engine
from dpn_rt.schema.bounds import bound_problems
from dpn_rt.settings import EngineOptions, resolve
from tests.engine.models import MODEL as LARGER
from tests.format.engines import MODEL, SOURCE, random_weights

HUGE = (10**9, 10**30, 10**99)
NO_INTEGERS = (True, 4.0, "4", None, [1])
PLACES = (
    *(f"model.decoder.{name}" for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers")),
    *(f"model.decoder.{name}" for name in ("num_heads", "num_kv_heads", "head_dim", "max_position_embeddings")),
    *(f"model.vision.{name}" for name in ("hidden_size", "num_layers", "num_heads", "image_size", "patch_size")),
    "model.projector.input_size",
    "model.reduction.boundaries.0.layer",
    "model.reduction.boundaries.0.kernels.2.0",
    "model.prompt.eos_token_ids.0",
)
FLOATS = ("model.decoder.rms_norm_eps", "model.decoder.rope.theta", "model.vision.layer_norm_eps")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`engine.json` of an engine, which each test changes."""
    path = tmp_path_factory.mktemp("bounds") / "engine"
    write_engine(path, MODEL, SOURCE, random_weights().items())
    return path / "engine.json"


def message_with(manifest: Path, changes: dict[str, Any]) -> str:
    """The error of opening an engine with other values at these places."""
    before = manifest.read_bytes()
    content = json.loads(before)
    for place, value in changes.items():
        *above, last = (int(key) if key.isdigit() else key for key in place.split("."))
        owner = content
        for key in above:
            owner = owner[key]
        owner[last] = value
    try:
        manifest.write_text(json.dumps(content))
        with pytest.raises(EngineError) as info:
            EngineDir.open(manifest.parent, verify=False)
    finally:
        manifest.write_bytes(before)
    assert len(str(info.value)) < 1000
    return str(info.value)


@pytest.mark.parametrize("place", PLACES)
def test_whole_numbers(manifest: Path, place: str) -> None:
    name = place.rpartition(".")[2]
    for value in (*HUGE, -1):
        message = message_with(manifest, {place: value})
        assert str(value) in message and (name in message or name.isdigit() or name == "layer"), message
    for value in NO_INTEGERS:
        assert "expected " in message_with(manifest, {place: value})


@pytest.mark.parametrize("place", FLOATS)
def test_numbers(manifest: Path, place: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 0, -1.0, 1e-30, 1e300, 10**99):
        assert place.rpartition(".")[2] in message_with(manifest, {place: value})
    for value in (True, "1", None):
        assert "expected " in message_with(manifest, {place: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.prompt.bos_token_id": 20}, "bos_token_id 20 is outside the vocabulary of 20"),
        ({"model.prompt.eos_token_ids": [2, 20]}, "eos_token_ids 20 is outside the vocabulary of 20"),
        ({"model.prompt.bos_token_id": -1}, "bos_token_id must be at least 0, got -1"),
        ({"model.prompt.image_token_id": -1}, "image_token_id must be at least 0, got -1"),
        ({"model.prompt.image_token_id": 10**30}, "image_token_id must be at most 4194304"),
        ({"model.prompt.eos_token_ids": [1] * 300}, "eos_token_ids must be at most 256 items, got 300"),
        ({"model.decoder.rope.scaling_json": "{"}, "rope scaling {: not JSON"),
        ({"model.decoder.rope.scaling_json": "[1]"}, "rope scaling [1]: expected a JSON object"),
        ({"model.decoder.rope.scaling_json": "[" * 9999}, "nested more than 64 deep"),
        (
            {"model.decoder.rope.scaling_json": '{"rope_type": "linear", "factor": "x"}'},
            "no frequencies can be computed",
        ),
        (
            {
                "model.decoder.rope.scaling_json": '{"rope_type": "yarn", "factor": 2.0, "attention_factor": NaN, '
                '"original_max_position_embeddings": 64}'
            },
            "gives the attention factor nan, expected a positive number",
        ),
        (
            {
                "model.reduction": {
                    "method": "chain",
                    "steps": [{"method": "fastv", "k": 2, "ratio": float("nan")}],
                    "boundaries": [1],
                }
            },
            "ratio must be a finite number, got nan",
        ),
        (
            {
                "model.reduction": {
                    "method": "chain",
                    "steps": [{"method": "fastv", "k": 2, "ratio": 5.0}],
                    "boundaries": [1],
                }
            },
            "ratio=5: expected a share from 0 to 1",
        ),
        ({"files": {"weights.safetensors": None}}, "expected an object, got None"),
        ({"files": {f"f{i}": {} for i in range(MAX_FILES + 1)}}, "files has 2,049 entries, expected at most 2,048"),
        ({"files": {"x" * 5000: {"sha256": "", "bytes": 1}}}, "files: weights.safetensors is missing"),
        ({"builder_version": 3}, "builder_version: expected str, got 3"),
    ],
)
def test_other_values(manifest: Path, changes: dict[str, Any], message: str) -> None:
    assert message in message_with(manifest, changes)


def test_published_models_are_far_within_the_bounds() -> None:
    assert not list(bound_problems(LARGER))


def test_lengths_that_the_memory_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the tables are made."""
    monkeypatch.setattr(loading, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(loading, "rope_table", None)
    settings = resolve(LARGER, EngineOptions(max_model_len=512, max_num_seqs=4096))
    with pytest.raises(CapacityError, match=r"max_model_len=512: .* take .* bytes, 1,048,576 are free: lower"):
        loading.check_length(settings, 128, 32)
    loading.check_length(resolve(LARGER, EngineOptions(max_model_len=16, max_num_seqs=1)), 16, 1)
