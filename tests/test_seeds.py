"""A failing test prints the seed that draws the same numbers again."""

from __future__ import annotations

import re

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
