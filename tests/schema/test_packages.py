"""Imports of packages."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from dpn_rt.schema.packages import import_large


@pytest.fixture
def collects(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether garbage is collected before the import; afterwards as the process had it."""
    before, wanted = gc.isenabled(), bool(request.param)
    (gc.enable if wanted else gc.disable)()
    request.addfinalizer(gc.enable if before else gc.disable)
    return wanted


@pytest.mark.parametrize("collects", [True, False], indirect=True)
@pytest.mark.parametrize("source", ["import gc\nENABLED = gc.isenabled()\n", "raise OSError('broken')\n"])
def test_import_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collects: bool, source: str) -> None:
    """No garbage is collected while the module is imported, and afterwards as before, whether it can be or not."""
    (tmp_path / "large_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        if "raise" in source:
            with pytest.raises(OSError, match="broken"):
                import_large("large_module")
        else:
            assert import_large("large_module").ENABLED is False
    finally:
        sys.modules.pop("large_module", None)
    assert gc.isenabled() is collects
