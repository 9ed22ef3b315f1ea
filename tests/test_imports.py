"""The direction in which modules may know of each other (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUEST_SIDE = {"scheduler", "sequence", "engine", "llm", "runner", "processor", "prompt", "chat", "image", "generate"}


def imported(path: Path) -> set[str]:
    """Names of the modules of dpn_rt that a file imports: `ops`, `config`, `builders`, ..."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "dpn_rt":
            modules = [f"dpn_rt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        names |= {module.split(".")[1] for module in modules if module.startswith("dpn_rt.")}
    return names


def files(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert found, f"{patterns} match no file"
    return found


def test_builders_know_only_the_engine_format() -> None:
    allowed = {"config", "errors", "engine_dir", "weight_spec", "weight_file", "model_checks", "builders"}
    for path in files("builders/*.py"):
        assert imported(path) <= allowed, path


def test_only_ops_import_the_extension() -> None:
    for path in files("dpn_rt/*.py", "dpn_rt/eager/*.py", "builders/*.py", "benchmarks/*.py"):
        assert "_kernels" not in imported(path), path


def test_the_model_knows_nothing_of_requests() -> None:
    for name in ("decoder", "vision", "pyramid", "layout", "kv_cache", "rope", "linear"):
        assert not imported(ROOT / f"dpn_rt/{name}.py") & REQUEST_SIDE, name


def test_the_decoder_sees_no_images() -> None:
    assert not imported(ROOT / "dpn_rt/decoder.py") & {"vision", "visual_input", "image", "pyramid", "layout"}


def test_only_builders_and_eager_read_checkpoints() -> None:
    for path in files("dpn_rt/*.py"):
        if path.name != "build.py":
            assert "builders" not in imported(path), path


def test_nothing_below_the_engine_knows_of_it() -> None:
    for path in files("dpn_rt/*.py"):
        if path.stem not in {"engine", "loader", "llm", "__init__", "generate", "serve"}:
            assert not imported(path) & {"engine", "llm"}, path
