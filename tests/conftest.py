"""Fixtures that tests of several packages share, and the plugin that tells what was skipped."""

from __future__ import annotations

from tests.places import place as place
from tests.skips import pytest_addoption as pytest_addoption
from tests.skips import pytest_sessionfinish as pytest_sessionfinish
from tests.skips import pytest_terminal_summary as pytest_terminal_summary
