"""A process that has loaded an engine on the CPU keeps freed memory for the next results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.test_freed_memory import IS_GLIBC
from tests.engine.models import write_random_engine
from tests.skips import NOT_GLIBC

MEASURE = """
import json, resource, sys
import torch
from dpn_rt import LLM

def faults(sizes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in sizes:
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if __name__ == "__main__":
    sizes = [40 << 20, 41 << 20] * 4
    faults(sizes)
    before = faults(sizes)
    llm = LLM(sys.argv[1], kv_cache_bytes=1 << 20, tensor_parallel_size=int(sys.argv[2]))
    faults(sizes)
    print(json.dumps([before, faults(sizes)]))
    llm.close()
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.skipif(not IS_GLIBC, reason=NOT_GLIBC)
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that each page is a fault of its own
    script = tmp_path / "measure.py"
    script.write_text(MEASURE, encoding="utf-8")
    command = [sys.executable, str(script), str(write_random_engine(tmp_path / "engine")), str(ranks)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = json.loads(result.stdout)
    assert before > 80_000 and after < 2_000
