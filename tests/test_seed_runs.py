"""`make seeds`: runs spread over parameter sets, new numbers and fixtures each, failures that can be repeated."""

from __future__ import annotations

import re
from collections import Counter

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest, torch
from hypothesis import given, settings, strategies as st

def note(line):
    with open("drawn.txt", "a") as file:
        file.write(line + "\\n")

@pytest.fixture(scope="module")
def weight():
    return torch.randn(1).item()

@pytest.mark.parametrize("number", range(3))
def test_random(weight, number):
    note(f"random {number} {weight} {torch.randn(1).item()}")

def test_own_generator():
    draw = torch.rand(1, generator=torch.Generator().manual_seed(torch.initial_seed())).item()
    note(f"own {draw}")
    assert draw < 0.5, f"drew {draw}"

@pytest.mark.parametrize("number", range(2))
def test_fixed(number):
    note("fixed")

@settings(max_examples=5)
@given(st.integers(0, 2**64))
def test_examples(number):
    note(f"example {number}")

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no GPU")
def test_skipped():
    note("skipped")
"""
CONFTEST = """
from tests.seeds import pytest_configure, pytest_runtest_setup
def pytest_collection(session):
    session.config.addinivalue_line("markers", "gpu: ...")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("DPN_RT_TEST_SEED", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_drawing=TESTS)
    return Run(pytester)


class Run:
    """Runs `TESTS`, and gives the report and what was drawn."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester

    def __call__(self, *arguments: str) -> tuple[str, list[str]]:
        notes = self._pytester.path / "drawn.txt"
        notes.unlink(missing_ok=True)
        result = self._pytester.runpytest("-p", "no:cacheprovider", "--tb=no", *arguments)
        return result.stdout.str(), notes.read_text().splitlines() if notes.exists() else []


@pytest.mark.parametrize(
    "processes", [[], ["-p", "xdist.plugin", "-n", "2", "--dist", "worksteal"]], ids=["one", "two"]
)
def test_runs_are_spread_over_parameter_sets(run: Run, processes: list[str]) -> None:
    report, drawn = run("-p", "tests.seed_runs", "--seeds", "12", *processes)
    random = [line.split() for line in drawn if line.startswith("random")]
    assert Counter(number for _, number, *_ in random) == {"0": 4, "1": 4, "2": 4}
    for column in (2, 3):
        assert len({line[column] for line in random}) == 12, "numbers of another run"
    assert drawn.count("fixed") == 2 and "skipped" not in drawn
    assert sum(line.startswith("own") for line in drawn) == 12
    assert 3 * 5 <= sum(line.startswith("example") for line in drawn) <= 3 * 5 + 10  # and the repeats of Hypothesis
    sections = [part.strip() for part in re.split(r"^=+ (.*) =+$", report, flags=re.MULTILINE)]
    assert sections[sections.index("functions that drew nothing by their seed") + 1] == "test_drawing.py::test_fixed"
    assert sections[sections.index("functions with fewer than 12 runs") + 1] == ""
    assert "3 random functions of 4, 39 runs of them" in report


def test_a_failure_is_repeated_by_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    report, drawn = run("-p", "tests.seed_runs", "--seeds", "30")
    failures = re.findall(r"DPN_RT_TEST_SEED=(\d+) python -m pytest (\S+)\n +AssertionError: (drew \S+)", report)
    own = [float(line.split()[1]) for line in drawn if line.startswith("own")]
    assert len(failures) == sum(draw >= 0.5 for draw in own) > 0
    assert f"{len(failures)} of 30  test_drawing.py::test_own_generator" in report
    seed, nodeid, message = failures[-1]
    monkeypatch.setenv("DPN_RT_TEST_SEED", seed)
    assert run(nodeid)[1] == [message.replace("drew", "own")]


def test_examples_follow_the_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPN_RT_TEST_SEED", "5")
    (_, first), (_, second) = (run("test_drawing.py::test_examples") for _ in range(2))
    monkeypatch.setenv("DPN_RT_TEST_SEED", "6")
    assert first == second != run("test_drawing.py::test_examples")[1]


def test_a_slow_function_is_listed_with_its_runs(run: Run) -> None:
    report, drawn = run("-p", "tests.seed_runs", "--seeds", "12", "--seconds-per-function", "0")
    assert sum(line.startswith("random") for line in drawn) == 3
    assert re.search(r"\n +3 in \d+ s  test_drawing.py::test_random\n", report)
    assert re.search(r"\n +1 in \d+ s  test_drawing.py::test_own_generator\n", report)
