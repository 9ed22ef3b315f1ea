"""The example of reductions side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from examples import compare_reducers


def test_it_prints_a_line_a_reduction_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_reducers.main(["--scenes", "1", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == list(compare_reducers.SPECS)
    assert lines[1].split()[2:4] == ["100", "%"] and lines[5] == str(tmp_path / "compare_reducers.png")
    with Image.open(tmp_path / "compare_reducers.png") as picture:
        assert picture.height > 4 * 224
