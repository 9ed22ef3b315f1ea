"""Results as JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpn_rt.evaluate.writing import write_whole


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes a result, or leaves the one that was there.

    Raises:
        EvaluationError: it cannot be written, as on a full disk.
    """
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
