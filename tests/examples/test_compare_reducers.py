"""The example of reductions side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from examples import compare_reducers


def test_wrong_options_are_told_before_anything_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        (["--scenes", "0"], "argument --scenes: '0': expected at least 1"),
        (["--scenes", "-1"], "argument --scenes: '-1': expected a whole number"),
        (["--output", str(file)], f"--output {file}: File exists"),
    ):
        with pytest.raises(SystemExit) as ended:
            compare_reducers.main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_it_prints_a_line_a_reduction_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_reducers.main(["--scenes", "1", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == list(compare_reducers.SPECS)
    assert lines[1].split()[2:4] == ["100", "%"] and lines[5] == str(tmp_path / "compare_reducers.png")
    with Image.open(tmp_path / "compare_reducers.png") as picture:
        assert picture.height > 4 * 224
