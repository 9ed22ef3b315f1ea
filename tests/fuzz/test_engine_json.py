"""engine.json: an engine is loaded, or there is an error of our own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DpnError
from tests.builders.checkpoints import OriginalCheckpoint
from tests.fuzz.harness import Surface, assert_own_words, fuzz
from tests.fuzz.json_mutations import mutate_json

OPTIONS = {"kv_cache_bytes": 1 << 20, "max_num_seqs": 2}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    checkpoint = OriginalCheckpoint().fill()
    return build_engine(checkpoint.write(tmp_path / "checkpoint"), tmp_path / "engine").path


def test_every_engine_json_is_loaded_or_refused(engine: Path) -> None:
    file = engine / "engine.json"

    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            LLM(engine, device="cpu", **OPTIONS)  # type: ignore[arg-type]
        except DpnError as error:
            assert_own_words(str(error), 20_000)  # all wrong weights are named

    fuzz(Surface("engine_json", [file.read_bytes()], mutate, check))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Most often a change of the model alone: the rest is compared with the files."""
    try:
        manifest = json.loads(data)
        if rng.random() < 0.3:
            return mutate_json(data, rng)
        manifest["model"] = json.loads(mutate_json(json.dumps(manifest["model"]).encode(), rng))
        return json.dumps(manifest).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return mutate_json(data, rng)
