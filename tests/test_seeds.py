"""A failing test prints the seed that draws the same numbers again."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import random
import pytest, torch

@pytest.fixture(scope="module")
def weights():
    return torch.randn(3)

@pytest.mark.parametrize("number", range(2))
def test_one(weights, number):
    assert False, f"drew {weights.tolist()} {torch.randn(2).tolist()} {random.random()}"
"""


def test_a_seed_is_printed_and_taken(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeconftest("from tests.seeds import pytest_configure, pytest_runtest_setup")
    pytester.makepyfile(TESTS)

    def run() -> tuple[list[str], list[str]]:
        text = pytester.runpytest("-p", "no:cacheprovider").stdout.str()
        return re.findall(r"DPN_RT_TEST_SEED=(\d+)", text), re.findall(r"^E .*Error: drew (\[.*)", text, re.MULTILINE)

    (seeds, drawn), (others, redrawn) = run(), run()
    assert len(drawn) == len(set(drawn)) == 2 and not set(drawn) & set(redrawn)
    assert len(set(seeds)) == len(set(others)) == 1 and seeds != others
    monkeypatch.setenv("DPN_RT_TEST_SEED", seeds[0])
    assert run() == (seeds, drawn)


def test_no_generator_is_without_a_seed() -> None:
    """What they draw could not be drawn again."""
    unseeded = ("default_rng", "Random", "SeedSequence", "RandomState")
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and not node.args and not node.keywords:
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                assert name not in unseeded, f"{file}:{node.lineno}: {name}() takes torch.initial_seed() as its seed"
