"""Which of several kernels this process uses on the CPU: measured once for each kind of processor."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from threading import Lock
from typing import Any

import torch

from dpn_rt import ops
from dpn_rt.errors import ConfigError
from dpn_rt.tuning import choice_file

VARIABLE = "DPN_RT_CPU_CHOICES"
MOST_STREAMED_ROWS = {"portable": 4, "avx2": 12, "avx512": 32, "avx512_vnni": 32, "avx512_bf16": 32, "amx": 8}
"""Without a measurement, by instruction set; measured by `benchmarks/ops.py`."""
LARGEST_ROWS = 64
"""`most_streamed_rows` at most."""
_LOCK = Lock()


@dataclass(frozen=True)
class CpuChoices:
    """One process never changes them once a weight is loaded: other kernels round differently."""

    attention: str
    """Instruction set of attention of many rows in bfloat16."""
    attention_decode: str
    """Instruction set of attention of one row a sequence, with as many key/value heads as query heads."""
    attention_decode_grouped: str
    """The same where query heads share a key/value head."""
    linear: str
    """Instruction set of products with few rows."""
    most_streamed_rows: int
    """Rows of bfloat16 up to which our kernel, which reads a weight once, beats oneDNN."""

    def __post_init__(self) -> None:
        for op, isas in candidates(ops.cpu_isa()).items():
            if getattr(self, op) not in isas:
                raise ConfigError(f"{op} is {getattr(self, op)!r}, expected one of: {', '.join(isas)}")
        if type(self.most_streamed_rows) is not int or not 0 <= self.most_streamed_rows <= LARGEST_ROWS:
            raise ConfigError(f"most_streamed_rows is {self.most_streamed_rows!r}, expected 0 to {LARGEST_ROWS}")


def candidates(isa: str) -> dict[str, tuple[str, ...]]:
    """Op -> instruction sets that may be its fastest one where the processor has `isa`, the likeliest first.

    The dot products of bfloat16 pairs that `avx512_bf16` adds are faster than float32 ones on some processors only.
    `amx` stands for them where an op has no kernel for tiles.
    """
    pairs = {"amx": ("amx", "avx512"), "avx512_bf16": ("avx512_bf16", "avx512")}.get(isa, (isa,))
    tiles = ("amx", "avx512_bf16", "avx512") if isa == "amx" else pairs
    return {"attention": tiles, "attention_decode": pairs, "attention_decode_grouped": tiles, "linear": pairs}


def default_choices() -> CpuChoices:
    """Those of the instruction set, without a measurement."""
    isa = ops.cpu_isa()
    likeliest = {op: isas[0] for op, isas in candidates(isa).items()}
    return CpuChoices(**likeliest, most_streamed_rows=MOST_STREAMED_ROWS[isa])


def cpu_choices() -> CpuChoices:
    """The choices of this process, which the kernels follow from now on.

    They are read from the user's cache directory, or measured in about a second and written there. The environment
    variable `DPN_RT_CPU_CHOICES` sets some and leaves the others at their defaults, without a measurement:
    `attention=amx,linear=avx512,most_streamed_rows=8`, or `default`.

    Raises:
        ConfigError: the environment variable names an unknown choice or value.
    """
    with _LOCK:
        return _cpu_choices()


@cache
def _cpu_choices() -> CpuChoices:
    given = os.environ.get(VARIABLE)
    choices = parse(given) if given else _known_or_measured()
    for op in candidates(ops.cpu_isa()):
        ops.tune_cpu_isa(op, getattr(choices, op))
    return choices


def parse(text: str) -> CpuChoices:
    """The default choices, and what `text` has instead (see `cpu_choices`).

    Raises:
        ConfigError: a choice or its value is unknown.
    """
    choices = default_choices()
    if text == "default":
        return choices
    names = [field.name for field in fields(CpuChoices)]
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not value:
            raise ConfigError(f"{VARIABLE} has {part!r}, expected default, or NAME=VALUE with {', '.join(names)}")
        is_number = name == "most_streamed_rows" and value.isascii() and value.isdecimal()
        change: dict[str, Any] = {name: int(value) if is_number else value}
        try:
            choices = replace(choices, **change)
        except ConfigError as error:
            raise ConfigError(f"{VARIABLE}: {error}") from None
    return choices


def _known_or_measured() -> CpuChoices:
    path, machine = choice_file.default_path(), _machine()
    known = _checked(choice_file.read(path, machine))
    if known is None:
        from dpn_rt.tuning.measure import measured_choices  # most processes never need it

        # Where another process was faster, its choices hold, so that both round alike.
        measured = measured_choices(default_choices(), candidates(ops.cpu_isa()))
        known = _checked(choice_file.add(path, machine, asdict(measured))) or measured
    return known


def _machine() -> str:
    """What a measurement depends on."""
    threads = f"{torch.get_num_threads()} threads"
    return f"{choice_file.processor_model()}, {ops.cpu_isa()}, {threads}, torch {torch.__version__}"


def _checked(values: dict[str, object] | None) -> CpuChoices | None:
    """None for what another version, or anybody, may have written into the file."""
    try:
        return None if values is None else CpuChoices(**values)  # type: ignore[arg-type]
    except (TypeError, ConfigError):
        return None
