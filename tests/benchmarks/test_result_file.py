"""A result that cannot be written as a whole leaves the one that was there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measuring.result_file import write_json
from tests.skips import NOT_LINUX

FULL_DISK = """
import resource, sys
from pathlib import Path
from benchmarks.measuring.result_file import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_json(Path(sys.argv[1]), {"rows": list(range(10_000))})
"""


def test_a_result_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results" / "result.json"
    for number in (1, 2):
        write_json(path, {"number": number})
        assert json.loads(path.read_text()) == {"number": number}
    assert path.read_text().endswith("}\n") and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason=NOT_LINUX)
@pytest.mark.parametrize("before", [None, '{"number": 1}\n'])
def test_a_full_disk_changes_nothing(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    if before is not None:
        path.write_text(before)
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "result.json: cannot be written" in result.stderr
    assert [each.read_text() for each in tmp_path.iterdir()] == ([] if before is None else [before])
