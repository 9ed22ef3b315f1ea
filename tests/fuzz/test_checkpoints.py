"""Checkpoints with changed config.json and headers of weights: an engine is built, or there is an error of our own."""

from __future__ import annotations

import random
from pathlib import Path

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DpnError
from tests.builders.checkpoints import OriginalCheckpoint
from tests.fuzz.byte_mutations import mutate_bytes
from tests.fuzz.harness import Surface, assert_own_words, fuzz
from tests.fuzz.json_mutations import mutate_json


def build(checkpoint: Path) -> None:
    """An engine, or an error that says why not."""
    try:
        build_engine(checkpoint, checkpoint.parent / "engine", force=True)
    except DpnError as error:
        assert_own_words(str(error), 20_000)


def test_every_config_is_built_or_refused(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "checkpoint")
    seed = (path / "config.json").read_bytes()

    def check(data: bytes) -> None:
        (path / "config.json").write_bytes(data)
        build(path)

    fuzz(Surface("config_json", [seed], mutate_json, check))


def test_every_header_is_read_or_refused(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "checkpoint")
    file = path / "model.safetensors"
    header, tensors = split(file.read_bytes())

    def check(data: bytes) -> None:
        file.write_bytes(data + tensors)
        build(path)

    fuzz(Surface("safetensors", [header], mutate_header, check))


def split(data: bytes) -> tuple[bytes, bytes]:
    """The header with its length, and the tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Usually of the JSON, with a length that fits."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    text = mutate_json(data[8:], rng)
    return len(text).to_bytes(8, "little") + text
