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


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports from or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "dpn_rt.plans":
            names |= {f"dpn_rt.plans.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def files(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert found, f"{patterns} match no file"
    return found


def test_builders_know_only_the_engine_format() -> None:
    allowed = {"config", "errors", "engine_dir", "weight_spec", "weight_file", "model_checks", "builders"}
    for path in files("builders/*.py", "builders/*/*.py"):
        assert imported(path) <= allowed | {"plans", "trtllm"}, path


def test_builders_know_of_plans_what_the_engine_holds() -> None:
    """Neither how plans are run, nor anything of TensorRT-LLM but its surface."""
    shared = {"dpn_rt.plans", "dpn_rt.plans.config", "dpn_rt.plans.library", "dpn_rt.plans.tensors"}
    for path in files("builders/*.py", "builders/*/*.py"):
        modules = imported_modules(path)
        assert {name for name in modules if name.startswith("dpn_rt.plans")} <= shared, path
        assert {name for name in modules if name.startswith("dpn_rt.trtllm")} <= {"dpn_rt.trtllm.surface"}, path


def test_tensorrt_is_imported_where_it_is_needed() -> None:
    """By name at run time: no module of the product fails where it is missing."""
    for path in files("dpn_rt/*.py", "dpn_rt/*/*.py", "builders/*/*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"tensorrt", "tensorrt_rtx_bindings", "tensorrt_rtx", "tensorrt_llm", "cuda"}, path


def test_plans_know_nothing_of_requests() -> None:
    for path in files("dpn_rt/plans/*.py", "dpn_rt/trtllm/*.py", "dpn_rt/backend.py", "dpn_rt/native.py"):
        assert not imported(path) & REQUEST_SIDE, path


def test_only_ops_import_the_extension() -> None:
    for path in files("dpn_rt/*.py", "dpn_rt/eager/*.py", "builders/*.py", "benchmarks/*.py"):
        assert "_kernels" not in imported(path), path


def test_the_model_knows_nothing_of_requests() -> None:
    for name in ("decoder", "vision", "pyramid", "layout", "kv_cache", "rope", "linear"):
        assert not imported(ROOT / f"dpn_rt/{name}.py") & REQUEST_SIDE, name


def test_devices_know_nothing_of_requests() -> None:
    for path in files("dpn_rt/device/*.py"):
        assert not imported(path) & (REQUEST_SIDE | {"sampling", "outputs"}), path


def test_few_files_ask_for_cuda() -> None:
    """All others take a device and do not ask which, so that what they do is tested without a GPU."""
    allowed = {"dpn_rt/device/cuda.py", "dpn_rt/device/opening.py", "dpn_rt/plans/cuda.py"}
    for path in files("dpn_rt/*.py", "dpn_rt/device/*.py", "dpn_rt/plans/*.py"):
        uses = "torch.cuda" in path.read_text(encoding="utf-8")
        assert uses == (str(path.relative_to(ROOT)) in allowed), path


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
