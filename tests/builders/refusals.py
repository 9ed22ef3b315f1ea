"""What the builder says of checkpoints that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError, DpnError
from tests.builders.checkpoints import OriginalCheckpoint


def message_of(checkpoint: OriginalCheckpoint, tmp_path: Path, kind: type[DpnError] = CheckpointError) -> str:
    """The error of building an engine."""
    path = checkpoint.write(tmp_path / "checkpoint")
    return message_of_path(path, tmp_path, kind)


def message_of_path(path: Path, tmp_path: Path, kind: type[DpnError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as info:
        build_engine(path, tmp_path / "engine", **options)
    assert not (tmp_path / "engine").exists()
    assert not any(file.name.startswith(".") for file in tmp_path.iterdir())
    assert "\n" not in str(info.value)
    return str(info.value)
