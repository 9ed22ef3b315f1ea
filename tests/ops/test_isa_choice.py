"""The instruction set of this process."""

from __future__ import annotations

import os

from dpn_rt import ops
from tests.ops.conftest import CPU_ONLY

DEVICES = CPU_ONLY


def test_the_best_is_the_default_and_the_environment_variable_forces() -> None:
    """`test_isa.py` starts a process for each of the others."""
    available = ops.available_cpu_isas()
    assert available[0] == "portable"
    assert ops.cpu_isa() == (os.environ.get("DPN_RT_CPU_ISA") or available[-1])
