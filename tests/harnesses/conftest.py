from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import OPTIONS, RunningServer, run_server
from tests.server.conftest import engine_dir as engine_dir
from tests.server.conftest import llm as llm


@pytest.fixture(scope="session")
def server(engine_dir: Path) -> Iterator[RunningServer]:
    running = run_server(engine_dir, OPTIONS)
    yield running
    running.stop()
