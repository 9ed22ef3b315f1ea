"""The instruction set that the CPU kernels use."""

from __future__ import annotations

from dpn_rt import _kernels
from dpn_rt.errors import ConfigError


def cpu_isa() -> str:
    """The best one that this processor runs: `portable`, `avx2`, `avx512`, `avx512_vnni`, `avx512_bf16` or `amx`.

    The environment variable `DPN_RT_CPU_ISA` selects one of `available_cpu_isas()`. It is read when `dpn_rt.ops` is
    imported.

    Raises:
        ConfigError: the variable has another value.
    """
    try:
        return str(_kernels.cpu_isa())
    except RuntimeError as error:
        raise ConfigError(str(error)) from None


def available_cpu_isas() -> list[str]:
    """Instruction sets that this build has and this processor runs, slowest first."""
    return list(_kernels.available_cpu_isas())


def tune_cpu_isa(op: str, isa: str) -> None:
    """From now on the kernels of an op use this instruction set instead of `cpu_isa()`.

    Args:
        op: `attention` (also with paged keys), `attention_decode`, `attention_decode_grouped` (where query heads share
            a key/value head) or `linear`.
        isa: one of `available_cpu_isas()`.

    Raises:
        ValueError: the op or the instruction set is unknown, or cannot run here.
    """
    _kernels.tune_cpu_isa(op, isa)


def tuned_cpu_isa(op: str) -> str:
    """The instruction set of one of the ops that `tune_cpu_isa` takes."""
    return str(_kernels.tuned_cpu_isa(op))
