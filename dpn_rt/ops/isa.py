"""The instruction set that the CPU kernels use."""

from __future__ import annotations

from dpn_rt import _kernels


def cpu_isa() -> str:
    """`portable`, `avx2`, `avx512` or `avx512_bf16`: the best one that this processor runs.

    The environment variable `DPN_RT_CPU_ISA` selects one of `available_cpu_isas()`. It is read when `dpn_rt.ops` is
    imported.
    """
    return str(_kernels.cpu_isa())


def available_cpu_isas() -> list[str]:
    """Instruction sets that this build has and this processor runs, slowest first."""
    return list(_kernels.available_cpu_isas())
