"""Commands of the repository write into their own directories alone: never to a device, never into a stranger's."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.skips import NO_COMPILER

ROOT = Path(__file__).parents[1]
COMPILER = """#!{python}
import os, sys
output = sys.argv[sys.argv.index("-o") + 1]
with open({log!r}, "a") as log:
    print(output, file=log)
if os.path.isabs(output) and not output.startswith("/dev/"):
    open(output, "wb").close()
    sys.exit({status})
sys.exit("the output is a device or in the working directory: " + output)
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Puts a stand-in for nvcc on the PATH that notes where it was to write; gives a function that reads the notes."""
    log = tmp_path / "outputs"

    def install(status: int) -> Path:
        program = tmp_path / "bin" / "nvcc"
        program.parent.mkdir()
        program.write_text(COMPILER.format(python=sys.executable, log=str(log), status=status))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
        (tmp_path / "scratch").mkdir()
        return log

    return install


@pytest.mark.parametrize("status", [0, 3], ids=["compiles", "fails"])
def test_the_resources_of_kernels_are_counted_in_a_temporary_directory(
    compiler: Callable[[int], Path], tmp_path: Path, status: int
) -> None:
    log = compiler(status)
    sources = [str(path) for path in sorted((ROOT / "csrc" / "ops").glob("*/*_cuda.cu"))[:2]]
    command = [sys.executable, str(ROOT / "cmake" / "cuda_resources.py"), "--sources", *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode != 0) == (status != 0), done.stderr
    outputs = log.read_text().splitlines()
    assert len(set(outputs)) == len(outputs) and outputs
    assert all(Path(output).is_relative_to(tmp_path / "scratch") for output in outputs)
    assert not any((tmp_path / "scratch").iterdir()), "the temporary directories are removed"
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_no_command_names_a_device_as_its_output() -> None:
    """A compiler, linker or archiver that runs as root replaces what `-o` names; a shell's `>` only writes to it."""
    folders = (".ci", "benchmarks", "builders", "cmake", "dpn_rt", "examples", "tests")
    files = [ROOT / "Makefile", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    scripts = [
        f for f in files if f.suffix in (".py", ".sh", ".cmake") or f.name == "Makefile" or f.parent.name == ".ci"
    ]
    option = re.compile(r"""(-o|--output|--json|--plot|cp|mv|ln -sf?|tee|install|rm)[\s"',=]+/dev/(?!zero)""")
    found = [f"{f.name}: {m.group()}" for f in scripts if f != Path(__file__) for m in option.finditer(f.read_text())]
    assert found == []


@pytest.mark.skipif(shutil.which("make") is None, reason=NO_COMPILER)
def test_clean_removes_what_the_makefile_made_and_nothing_that_an_environment_names(tmp_path: Path) -> None:
    """`VENV` may come from the user's environment and be the directory of another project."""
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    for name in ("mine", ".venv", "build"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "VENV": str(tmp_path / "mine")}
    subprocess.run(["make", "clean"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "mine"]
    subprocess.run(["make", "clean", "VENV="], cwd=tmp_path, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "mine"]
