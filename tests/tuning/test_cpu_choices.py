"""Choices of kernels: what the environment says, what the cache file keeps, and what a process does with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dpn_rt import ops
from dpn_rt.errors import ConfigError
from dpn_rt.tuning import cpu_choices as module
from dpn_rt.tuning import measure
from dpn_rt.tuning.cpu_choices import VARIABLE, CpuChoices, candidates, default_choices, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a new process whose cache directory is empty; the path of the cache file."""
    before = {op: ops.tuned_cpu_isa(op) for op in candidates(ops.cpu_isa())}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    module._cpu_choices.cache_clear()
    yield tmp_path / "dpn_rt" / "cpu_choices.json"
    module._cpu_choices.cache_clear()
    for op, isa in before.items():
        ops.tune_cpu_isa(op, isa)


class Measurement:
    """Stands for `measured_choices`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: CpuChoices) -> None:
        self.calls, self._result = 0, result
        monkeypatch.setattr(measure, "measured_choices", self)

    def __call__(self, default: CpuChoices, _: object) -> CpuChoices:
        assert default == default_choices()
        self.calls += 1
        return self._result


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measurement:
    return Measurement(monkeypatch, replace(default_choices(), most_streamed_rows=16))


def again() -> CpuChoices:
    """The choices of another process."""
    module._cpu_choices.cache_clear()
    return module.cpu_choices()


def test_a_measurement_is_kept_for_other_processes(fresh: Path, measured: Measurement) -> None:
    chosen = module.cpu_choices()
    assert chosen.most_streamed_rows == 16 and measured.calls == 1
    assert [json.loads(fresh.read_text())[key] for key in json.loads(fresh.read_text())] == [asdict(chosen)]
    assert module.cpu_choices() is chosen, "a process does not change its mind"
    assert again() == chosen and measured.calls == 1
    assert [path.name for path in fresh.parent.iterdir()] == [fresh.name], "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b'{"%s": 3}', b'{"%s": {"linear": "sse9"}}', b"[" * 100_000),
        b'{"%s": {"attention": "portable", "attention_decode": "x", "attention_decode_grouped": 1, "linear": 3, '
        b'"most_streamed_rows": true}}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_says_nothing_is_measured_again(fresh: Path, measured: Measurement, content: bytes) -> None:
    fresh.parent.mkdir()
    fresh.write_bytes(content.replace(b"%s", module._machine().encode()))
    assert module.cpu_choices().most_streamed_rows == 16 and measured.calls == 1


def test_other_machines_stay_in_the_file(fresh: Path, measured: Measurement) -> None:
    fresh.parent.mkdir()
    fresh.write_text('{"another": {"x": 1}}')
    module.cpu_choices()
    assert len(json.loads(fresh.read_text())) == 2
    assert again().most_streamed_rows == 16 and measured.calls == 1


@pytest.mark.parametrize("place", ["a file", "/dev/null/x", "/proc/none"])
def test_a_directory_that_cannot_be_written(
    fresh: Path, measured: Measurement, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "a file":
        place = str(fresh.parent.parent / "file")
        Path(place).touch()
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert again().most_streamed_rows == 16 and again().most_streamed_rows == 16
    assert measured.calls == 2


def test_the_first_of_two_processes_decides(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = replace(default_choices(), most_streamed_rows=4)

    def slow(default: CpuChoices, _: object) -> CpuChoices:
        fresh.parent.mkdir()
        fresh.write_text(json.dumps({module._machine(): asdict(theirs)}))
        return replace(default, most_streamed_rows=64)

    monkeypatch.setattr(measure, "measured_choices", slow)
    assert module.cpu_choices() == theirs == again()


def test_the_environment_is_followed_without_a_measurement(
    fresh: Path, measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowest = candidates(ops.cpu_isa())["linear"][-1]
    monkeypatch.setenv(VARIABLE, f"linear={slowest},most_streamed_rows=0")
    assert again() == replace(default_choices(), linear=slowest, most_streamed_rows=0)
    assert ops.tuned_cpu_isa("linear") == slowest
    assert measured.calls == 0 and not fresh.exists()


def test_what_the_environment_may_say() -> None:
    assert parse("default") == default_choices()
    assert parse("most_streamed_rows=64").most_streamed_rows == 64
    cases = {
        "": "has ''",
        "fast": "has 'fast', expected default, or NAME=VALUE with attention, attention_decode, attention_decode_",
        "linear=": "has 'linear='",
        "linear=sse9": "linear is 'sse9', expected one of: ",
        "attention_decode=amx9": "attention_decode is 'amx9'",
        "most_streamed_rows=65": "most_streamed_rows is 65, expected 0 to 64",
        "most_streamed_rows=-1": "most_streamed_rows is '-1'",
        "most_streamed_rows=8,rows=3": "has 'rows=3'",
    }
    for text, message in cases.items():
        with pytest.raises(ConfigError, match=f"{VARIABLE}.*{message}"):
            parse(text)


def test_unknown_ops_and_instruction_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="'pool' is unknown, expected one of: attention, attention_decode, "):
        ops.tune_cpu_isa("pool", "portable")
    with pytest.raises(ValueError, match="'avx99' is unknown, expected one of: portable, avx2"):
        ops.tune_cpu_isa("linear", "avx99")
    with pytest.raises(ValueError, match="'pool' is unknown"):
        ops.tuned_cpu_isa("pool")
    for isa in {"avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"} - set(ops.available_cpu_isas()):
        with pytest.raises(ValueError, match=f"the instruction set of linear is {isa}, expected one of: portable"):
            ops.tune_cpu_isa("linear", isa)


def test_a_real_measurement_gives_choices_that_can_be_used(fresh: Path) -> None:
    chosen = module.cpu_choices()
    assert chosen == again()
    for op in candidates(ops.cpu_isa()):
        assert ops.tuned_cpu_isa(op) == getattr(chosen, op)


def test_an_import_measures_nothing(tmp_path: Path) -> None:
    code = "import dpn_rt, dpn_rt.llm, dpn_rt.model.linear, sys; print('dpn_rt.tuning.measure' in sys.modules)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop(VARIABLE, None)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert result.stdout.strip() == "False" and not list(tmp_path.iterdir())
