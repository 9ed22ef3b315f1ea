"""What tells one engine from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpn_rt.errors import EngineError
from dpn_rt.schema.files import SETTINGS_BYTES, read_file


def fingerprint(engine: Path) -> str:
    """Of an engine's manifest, which has the sha256 of all its files.

    Raises:
        EngineError: there is none.
    """
    return hashlib.sha256(read_file(engine / "engine.json", EngineError, SETTINGS_BYTES)).hexdigest()[:16]
