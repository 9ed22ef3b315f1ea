"""An engine of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpn_rt.format.engine_dir import EngineDir, write_engine
from tests.format.engines import MODEL, SOURCE, random_weights


@pytest.fixture
def engine(tmp_path: Path) -> EngineDir:
    return write_engine(tmp_path / "engine", MODEL, SOURCE, random_weights().items(), {"a.json": b"{}"})
