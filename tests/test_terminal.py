"""Commands and the encodings of their arguments and output; `test_build_command.py` and others have their own part."""

from __future__ import annotations

import argparse
import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.comparison.report import print_table
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.serve import main as serve
from dpn_rt.terminal import check_text, escape_output

ROOT = Path(__file__).parents[1]
NOT_UTF8 = "caf\udce9"
FOLDERS = ("dpn_rt", "builders", "benchmarks", "examples")


def commands() -> list[Path]:
    """Scripts that print text; `watch.py` prints numbers for its caller."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if (
                path.name != "watch.py"
                and '__name__ == "__main__"' in text
                and any(word in text for word in ("    print(", "print_table("))
            ):
                found.append(path)
    return found


@pytest.mark.parametrize("path", commands(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_escapes_its_output_first(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    body = main.body[1:] if ast.get_docstring(main) else main.body
    assert ast.unparse(body[0]) == "escape_output()", path


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
except SystemExit as end:
    sys.exit(9 if "torch" in sys.modules else end.code)
"""


@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
@pytest.mark.parametrize("command", ["build", "generate", "serve", "serve_ray", "evaluate"])
def test_help_and_a_wrong_option_do_not_wait_for_torch(command: str, option: str) -> None:
    arguments = [sys.executable, "-c", WITHOUT_TORCH, f"dpn_rt.{command}", option]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == (0 if option == "--help" else 2), result.stderr
    assert "usage: " in (result.stdout if option == "--help" else result.stderr)


def test_output_is_escaped_only_where_it_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for errors, expected in (("strict", b"\\xe9"), ("replace", b"?"), ("surrogateescape", b"\\xe9")):
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors))
        escape_output()
        print("é", end="", flush=True)
        assert written.getvalue() == expected
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="utf-8"))
    escape_output()
    print(f"é{NOT_UTF8}", end="", flush=True)
    assert written.getvalue() == "écaf\\udce9".encode()
    monkeypatch.setattr("sys.stdout", io.StringIO())
    escape_output()


def test_a_benchmarks_table_in_ascii() -> None:
    """`±` stands in its cells."""
    assert (
        "±" in (ROOT / "benchmarks" / "comparison" / "report.py").read_text(encoding="utf-8")
        and print_table is not None
    )
    script = "from dpn_rt.terminal import escape_output; escape_output(); print('5 ±11%')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
    assert done.stdout.strip() == rb"5 \xb111%"


def test_options_that_are_not_utf8_are_named() -> None:
    options = argparse.Namespace(model_name=NOT_UTF8, output=Path(NOT_UTF8), image=NOT_UTF8, count=3, hosts=["a"])
    with pytest.raises(ConfigError, match=r"^--model-name 'caf\\udce9': not UTF-8, expected text in UTF-8$"):
        check_text(options, file_names=("image",))
    options.model_name, options.hosts = "café", ["a", NOT_UTF8]
    with pytest.raises(ConfigError, match="^--hosts"):
        check_text(options, file_names=("image",))


@pytest.mark.parametrize("option", ["--served-model-name", "--api-key", "--host"])
def test_the_servers_options(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert serve(["--engine", "e", option, NOT_UTF8]) == 1
    assert capsys.readouterr().err == f"error: {option} 'caf\\udce9': not UTF-8, expected text in UTF-8\n"


def test_the_servers_key_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPN_RT_API_KEY", NOT_UTF8)
    assert serve(["--engine", "e"]) == 1
    assert capsys.readouterr().err == "error: DPN_RT_API_KEY: not UTF-8, expected a key in UTF-8\n"


def test_an_engine_whose_name_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineError, match=r"caf\\udce9': its name is not UTF-8"):
        EngineDir.open(tmp_path / NOT_UTF8)
    assert serve(["--engine", str(tmp_path / NOT_UTF8)]) == 1
    assert "expected a --served-model-name" in capsys.readouterr().err


STREAMS = """
import sys
from dpn_rt.terminal import escape_output, output_failed

def main():
    escape_output()
    first = open("/dev/null")
    print("note", file=sys.stderr)
    try:
        print("answer", flush=True)
    except OSError as error:
        return output_failed(error)
    return 0 if first.fileno() > 2 else 9

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("streams", "status", "told"),
    [
        ("", 0, "answer"),
        ("2>&-", 0, "answer"),
        ("2>/dev/full", 0, "answer"),
        ("2>&- <&-", 0, "answer"),
        (">/dev/full", 1, "note\nerror: standard output: No space left on device"),
        (">&-", 1, "note\nerror: standard output: Bad file descriptor"),
        (">&- <&-", 1, "note\nerror: standard output: Bad file descriptor"),
        (">&- 2>&- <&-", 1, ""),
        (">/dev/full 2>/dev/full", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(streams: str, status: int, told: str) -> None:
    """What commands open gets none of their numbers, an answer that nothing takes is an error, and a message is not."""
    command = ["bash", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, STREAMS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert ended.returncode == status
    expected = f"note\n{told}" if told == "answer" and "2>" not in streams else told
    assert (ended.stderr + ended.stdout).strip() == expected
