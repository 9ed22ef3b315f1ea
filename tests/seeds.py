"""Every test draws its random numbers by a seed of its own, made of the run's and the test's name.

The run's seed is printed where a test fails: `DPN_RT_TEST_SEED=123 pytest tests/...` draws the same numbers again. Give
it the whole file where fixtures are shared by its tests.
"""

from __future__ import annotations

import os
import random
import zlib

import numpy as np
import pytest
import torch

VARIABLE = "DPN_RT_TEST_SEED"
_SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    given = os.environ.get(VARIABLE)
    config.stash[_SEED] = int(given) if given else int.from_bytes(os.urandom(4), "little")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the test's fixtures, which may draw weights."""
    seed = item.config.stash[_SEED]
    own = zlib.crc32(f"{seed} {item.nodeid}".encode())
    torch.manual_seed(own)
    np.random.seed(own)  # noqa: NPY002  (libraries may draw from it)
    random.seed(own)
    print(f"{VARIABLE}={seed}")
