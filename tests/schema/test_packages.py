"""Imports of packages."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpn_rt.schema.packages import import_large


@pytest.fixture(params=[True, False], ids=["collecting", "not collecting"])
def collects(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether garbage is collected before the import; afterwards as the process had it."""
    before, wanted = gc.isenabled(), bool(request.param)
    (gc.enable if wanted else gc.disable)()
    yield wanted
    (gc.enable if before else gc.disable)()


@pytest.fixture
def large_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the module `large_module`."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "large_module.py"
    sys.modules.pop("large_module", None)


def test_no_garbage_is_collected_during_the_import(large_module: Path, collects: bool) -> None:
    large_module.write_text("import gc\nENABLED = gc.isenabled()\n")
    assert import_large("large_module").ENABLED is False
    assert gc.isenabled() is collects


def test_an_import_that_fails_leaves_the_collector_as_it_was(large_module: Path, collects: bool) -> None:
    large_module.write_text("raise OSError('broken')\n")
    with pytest.raises(OSError, match="broken"):
        import_large("large_module")
    assert gc.isenabled() is collects
