"""What happens to memory that was freed. Each case is a process of its own: the setting holds until a process ends."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

from dpn_rt.device import freed_memory
from dpn_rt.device.freed_memory import KEPT_BYTES, LEAST_BYTES, give_back_freed_memory, keep_freed_memory
from tests.skips import NOT_GLIBC

IS_GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
MEASURE = """
import json, resource, sys
import torch
from dpn_rt.device.freed_memory import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def layers():
    # As of a prefill: results of several sizes, each given up after the next one was made.
    for _ in range(4):
        last = None
        for megabytes in (3, 14, 7, 3, 70):
            last = torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)

kept = keep_freed_memory(int(sys.argv[1])) if int(sys.argv[1]) else None
layers()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
before = resident()
give_back_freed_memory()
print(json.dumps({"kept": kept, "faults": faults, "given_back": before - resident()}))
"""


def measured(num_bytes: int, **environment: str) -> dict[str, int]:
    """What the process tells; `num_bytes` to keep, 0: it does not ask for it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", MEASURE, str(num_bytes)]
    environment = {**inherited, "THP_MEM_ALLOC_ENABLE": "0", **environment}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(result.stdout)
    return found


@pytest.mark.skipif(not IS_GLIBC, reason=NOT_GLIBC)
def test_freed_memory_is_kept_and_given_back() -> None:
    """A page of 70 MB that is given again is 17,920 faults a round."""
    plain, kept = measured(0), measured(KEPT_BYTES)
    assert plain["kept"] is None and plain["faults"] > 17_000
    assert kept["kept"] and kept["faults"] < 500
    assert kept["given_back"] > 60 << 20


@pytest.mark.skipif(not IS_GLIBC, reason=NOT_GLIBC)
def test_no_more_is_kept_than_was_asked_for() -> None:
    few = measured(LEAST_BYTES)
    assert few["kept"] and few["faults"] > 17_000


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
@pytest.mark.skipif(not IS_GLIBC, reason=NOT_GLIBC)
def test_the_environment_wins(environment: dict[str, str]) -> None:
    found = measured(KEPT_BYTES, **environment)
    assert not found["kept"] and found["faults"] > 17_000


@pytest.mark.skipif(not IS_GLIBC, reason=NOT_GLIBC)
def test_other_settings_of_the_c_library_do_not_matter() -> None:
    assert measured(KEPT_BYTES, GLIBC_TUNABLES="glibc.rtld.optional_static_tls=512")["kept"]


class _OldLibrary:
    """As glibc before 2.35: blocks of at most 32 MB are kept."""

    def __init__(self) -> None:
        self.settings: dict[int, int] = {}

    def mallopt(self, parameter: int, value: int) -> int:
        if parameter == -3 and value > 32 << 20:
            return 0
        self.settings[parameter] = value
        return 1


@pytest.mark.parametrize("num_bytes", [0, 1, LEAST_BYTES - 1])
def test_little_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """A threshold of 0 would have the system map every small block."""
    library = _OldLibrary()
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: library)
    assert not keep_freed_memory(num_bytes, {}) and not library.settings


def test_an_old_library_keeps_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _OldLibrary()
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory(4 * KEPT_BYTES, {})
    assert library.settings == {-3: 32 << 20, -1: KEPT_BYTES}


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory(KEPT_BYTES, {})
    give_back_freed_memory()
