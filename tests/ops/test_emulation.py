"""The plain C++ that stands for AVX-512 and AMX instructions does what processors do (`emulation/`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.ops.conftest import CPU_ONLY
from tests.ops.emulated_build import build_program
from tests.skips import UNSUPPORTED_BY_CPU

DEVICES = CPU_ONLY
NO_INSTRUCTIONS = 77
FAULTS = {
    "unconfigured": "a tile is used without a configuration",
    "released": "a tile is used without a configuration",
    "palette": "palette is not 1",
    "reserved": "a reserved byte or start row of the configuration is not 0",
    "rows": "a tile has more than 16 rows",
    "width": "a tile is wider than 64 bytes",
    "half": "a tile has rows without bytes, or bytes without rows",
    "ninth": "a tile after the eighth is configured",
    "unused": "a tile is used that is not configured",
    "twice": "tiles are configured although an earlier kernel has not released them",
    "same": "two operands of a product are the same tile",
    "depth": "a has not as many elements of 4 bytes in a row as b has rows",
    "height": "sum and a have different numbers of rows",
}


def test_vectors_are_what_this_processor_computes(tmp_path: Path) -> None:
    result = subprocess.run([build_program("vectors_test", tmp_path)], capture_output=True, text=True, check=False)
    if result.returncode == NO_INSTRUCTIONS:
        pytest.skip(UNSUPPORTED_BY_CPU)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program("tiles_test", tmp_path_factory.mktemp("tiles"))


def test_products_of_tiles(tiles: Path) -> None:
    result = subprocess.run([tiles], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_processor_refuses_ends_the_process(tiles: Path, fault: str) -> None:
    result = subprocess.run([tiles, fault], capture_output=True, text=True, check=False)
    assert result.returncode < 0
    assert result.stderr == f"emulated AMX: {FAULTS[fault]}\n"
