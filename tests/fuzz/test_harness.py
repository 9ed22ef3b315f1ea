"""The harness finds what is wrong, keeps it, and begins with what failed before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.byte_mutations import mutate_bytes
from tests.fuzz.harness import Surface, assert_own_words, fuzz
from tests.fuzz.json_mutations import mutate_json

SEED = b'{"name": "fox", "sizes": [1, 2, 3], "deep": {"ratio": 0.5}}'


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "FAILURES", tmp_path / "failures")
    monkeypatch.setattr(harness, "CORPUS", tmp_path / "corpus")
    return tmp_path


def refuse_long_names(data: bytes) -> None:
    if len(data) > 2000:
        raise KeyError(len(data))


def test_a_fault_is_found_once_and_its_input_is_kept(folders: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="(?s)1 kinds of failures among .*KeyError") as info:
        fuzz(Surface("planted", [SEED], mutate_json, refuse_long_names), seconds=1)
    kept = [path for path in (folders / "failures" / "planted").iterdir() if str(path) in str(info.value)]
    assert kept and all(len(path.read_bytes()) > 2000 for path in kept)
    assert not list((folders / "failures" / "planted").glob("running-*"))


def test_the_corpus_comes_first(folders: Path) -> None:
    (folders / "corpus" / "planted").mkdir(parents=True)
    (folders / "corpus" / "planted" / "what failed once").write_bytes(b"old")
    seen: list[bytes] = []
    assert fuzz(Surface("planted", [SEED], mutate_json, seen.append), seconds=0) == len(seen)
    assert seen[:2] == [b"old", SEED]


@pytest.mark.parametrize("mutate", [mutate_json, mutate_bytes])
def test_changes_are_the_same_for_the_same_seed(mutate: harness.Mutate) -> None:
    def changed() -> list[bytes]:
        rng = random.Random(5)
        return [mutate(SEED, rng) for _ in range(50)]

    assert changed() == changed() and len(set(changed())) > 20


@pytest.mark.parametrize("text", ["<object object at 0x7f00aa00>", "pydantic: no", "[Errno 2]", "a" * 8001])
def test_words_of_libraries_are_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        assert_own_words(text)
    assert_own_words("route[0]=7: expected an expert from 0 to 2, or None")
