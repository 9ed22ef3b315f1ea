"""`DPN_RT_CPU_ISA` is read when the kernels are imported, so it takes a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engine.models import write_random_engine


def test_an_instruction_set_that_does_not_exist(tmp_path: Path) -> None:
    code = f"""
from dpn_rt import LLM, DpnError
try:
    LLM({str(write_random_engine(tmp_path / "engine"))!r})
except DpnError as error:
    print(error)
"""
    environment = {**os.environ, "DPN_RT_CPU_ISA": "avx99"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("DPN_RT_CPU_ISA is 'avx99', expected one of: portable"), told
