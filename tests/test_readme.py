"""Every command and every program of README.md runs as printed, or, where that would take long, is at least taken."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpn_rt.build import main as build
from dpn_rt.evaluate.__main__ import main as evaluate
from dpn_rt.generate import main as generate
from dpn_rt.serve import parser as serve_parser
from examples.tiny_dpn.export_questions import main as export_questions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "dpn_rt.build": build,
    "dpn_rt.generate": generate,
    "dpn_rt.evaluate": evaluate,
    "examples.tiny_dpn.export_questions": export_questions,
}


def blocks(kind: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [content for name, content in fenced if name == kind]


def commands() -> list[str]:
    """Lines that a shell would run; the output of the demo stands in a block of its own."""
    lines = [line.partition("  #")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(make|pip|python|\.) ", line)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory for these tests: it looks like the repository and may be written to."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "cmake", "CMakeLists.txt", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        yield folder


def test_the_readme_has_the_commands_that_are_tested_here() -> None:
    words = [shlex.split(line) for line in commands()]
    programs = {line[2] if line[0] == "python" else line[0] for line in words}
    assert {*COMMANDS, "dpn_rt.serve", "make", "pip"} <= programs


def test_build_generate_and_the_program_run_as_printed(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for line in commands():
        words = shlex.split(line)
        if words[0] == "python" and words[2] in COMMANDS:
            assert COMMANDS[words[2]](words[3:]) == 0, f"{line}\n{capsys.readouterr().err}"
            ran += 1
    assert ran >= 5
    assert (checkout / "engine" / "engine.json").is_file() and list(checkout.glob("*-pyramid.png"))
    capsys.readouterr()
    (program,) = blocks("python")
    (checkout / "program.py").write_text(program, encoding="utf-8")
    runpy.run_path(str(checkout / "program.py"))
    printed = capsys.readouterr().out.splitlines()
    promised = [line.partition("  # ")[2] for line in program.splitlines() if line.startswith("print(")]
    assert printed[: len(promised)] == promised and len(promised) >= 4


def test_what_is_supported_is_not_refused_as_well() -> None:
    """In any row: docs/models.md says what of a model is supported."""
    section = README.partition("## What is supported")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    names = next(row[1] for row in rows if row[0].strip() == "model").partition(":")[0]
    models = [name.partition(" (")[0].strip() for name in names.split(",")]
    assert {"LLaVA-NeXT", "LLaVA-OneVision", "DPN"} <= set(models)
    for row in rows:
        assert not [name for name in models if name in row[2]], row


def test_serves_options_are_taken() -> None:
    for line in commands():
        words = shlex.split(line)
        if words[0] == "python" and words[2] == "dpn_rt.serve":
            options = serve_parser().parse_args(words[3:])
            assert str(options.engine) == "engine"


def test_makes_targets_exist_and_the_demo_installs_nothing_more(checkout: Path) -> None:
    ran = 0
    for line in commands():
        if "make " in line and not line.startswith("python"):
            settings = dict(word.split("=", 1) for word in line.split("make ")[0].split())
            done = subprocess.run(
                [*shlex.split(line[line.index("make ") :]), "--dry-run", "--always-make"],
                capture_output=True, text=True, check=True, env={**os.environ, **settings},
            )  # fmt: skip
            assert ("-e '.'" in done.stdout) == ("demo" in line) and ("-e '.[dev]'" in done.stdout) == ("test" in line)
            assert "compiling the kernels" in done.stdout and "--verbose" in done.stdout, "it shows what it does"
            torch = re.search(r"TORCH=(\S+)", line)
            assert (torch.group(1) if torch else "torch==") in done.stdout
            ran += 1
    assert ran >= 3


def test_extras_that_are_installed_exist_and_nothing_comes_from_an_index_under_our_name() -> None:
    """The package is not published: `pip install 'dpn_rt[serve]'` would find nothing, or a stranger's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    ours = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "dpn_rt").rglob("*.py")]
    for path in ours:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install ['\"]?dpn_rt", text), path
        for command, extra in re.findall(r"(pip install .*?)'\.\[(\w+)\]'", text):
            assert extra in extras, path
            # In the repository Python finds the directory dpn_rt before a package that was installed as a copy, and the
            # compiled kernels are in the copy. Without isolation nothing is compiled again.
            assert command == "pip install --no-build-isolation -e ", path


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
