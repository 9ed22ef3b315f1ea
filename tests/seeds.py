"""Every test draws its random numbers by a seed of its own, made of the run's and the test's name.

The run's seed is printed where a test fails: `DPN_RT_TEST_SEED=123 pytest tests/...` draws the same numbers again. Give
it the whole file where fixtures are shared by its tests. Examples of Hypothesis follow the seed too.
`make seeds` runs tests with many seeds, see `seed_runs.py`.
"""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch

VARIABLE = "DPN_RT_TEST_SEED"
_SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    given = os.environ.get(VARIABLE)
    use_seed(config, int(given) if given else int.from_bytes(os.urandom(4), "little"))


def read_seed(config: pytest.Config) -> int:
    return config.stash[_SEED]


def use_seed(config: pytest.Config, seed: int) -> None:
    """Draw the next tests' random numbers by `seed`."""
    config.stash[_SEED] = seed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the test's fixtures, which may draw weights."""
    seed = item.config.stash[_SEED]
    own = zlib.crc32(f"{seed} {item.nodeid}".encode())
    if torch.cuda.is_available():
        torch.manual_seed(own)
    else:  # torch.manual_seed would keep a call for each kind of device that may come, each with its stack
        torch.default_generator.manual_seed(own)
    np.random.seed(own)  # noqa: NPY002  (libraries may draw from it)
    random.seed(own)
    if is_hypothesis_test(item):
        from hypothesis import seed as seed_examples

        seed_examples(own)(_that_takes_a_seed(item))
    print(f"{VARIABLE}={seed}")


def is_hypothesis_test(item: pytest.Item) -> bool:
    return bool(getattr(getattr(item, "obj", None), "is_hypothesis_test", False))


def _that_takes_a_seed(item: pytest.Item) -> Any:
    """The function under a method, or the class of a test of a state machine."""
    called = getattr(item, "obj", None)
    return getattr(called, "_hypothesis_state_machine_class", getattr(called, "__func__", called))
