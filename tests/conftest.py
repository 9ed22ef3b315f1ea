"""Fixtures that tests of several packages share, and the plugins that print seeds and report skipped tests."""

from __future__ import annotations

import os

import pytest

from tests.places import place as place
from tests.seeds import pytest_configure as pytest_configure
from tests.seeds import pytest_runtest_setup as pytest_runtest_setup
from tests.skips import pytest_addoption as pytest_addoption
from tests.skips import pytest_sessionfinish as pytest_sessionfinish
from tests.skips import pytest_terminal_summary as pytest_terminal_summary

# No test measures the machine or writes into the user's cache directory, unless it is about that.
os.environ.setdefault("DPN_RT_CPU_CHOICES", "default")

LONGEST = ("tests/ops/test_isa.py", "tests/server/test_serve_command.py", "tests/server/test_engine_process.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that processes finish at about the same time."""
    order = {name: -len(LONGEST) + i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], 0))
