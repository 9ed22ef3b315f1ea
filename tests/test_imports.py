"""The rules of imports between modules (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

ORDER = (
    *("errors", "memory", "schema", "terminal", "_kernels", "ops", "tuning", "device", "model", "format"),
    *("cache", "sampling", "drawing", "outputs", "prompts", "settings", "backends"),
    *("engine", "llm", "server", "generate", "serve", "ray_cluster", "ray_serve", "serve_ray", "batch", "evaluate"),
    *("integrations", "builders", "reference", "build", "eager", "training", "train_routers"),
)
"""Packages and modules of `dpn_rt`: each imports only from those before it."""


def imported_modules(path: Path) -> set[str]:
    """Full names of the product's modules that a file imports from, such as `dpn_rt.cache.lru_cache`."""
    return {name for name in all_imported_modules(path) if name.startswith("dpn_rt.")}


def all_imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "dpn_rt":
            names |= {"dpn_rt.llm" if alias.name == "LLM" else f"dpn_rt.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = (ROOT / node.module.replace(".", "/")).is_dir() and node.module != "dpn_rt.ops"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {node.module}
    return names


def packages(path: Path) -> set[str]:
    """Names of what a file imports of `dpn_rt`, as in `ORDER`."""
    return {name.split(".")[1] for name in imported_modules(path)} - {"SamplingParams", "DpnError"}


def files(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert found, f"{patterns} match no file"
    return found


def product_files() -> list[Path]:
    return [path for path in files("dpn_rt/**/*.py", "builders/**/*.py") if path.name != "__init__.py"]


def test_every_package_knows_only_those_before_it() -> None:
    for path in product_files():
        relative = path.relative_to(ROOT).with_suffix("")
        own = relative.parts[1] if relative.parts[0] == "dpn_rt" else relative.parts[0]
        assert own in ORDER, f"{path}: give {own} its place in ORDER"
        later = packages(path) - set(ORDER[: ORDER.index(own) + 1])
        assert not later, f"{path} imports {later}"


def test_package_files_import_nothing() -> None:
    """So that importing one module of a package does not import the others; four export names."""
    for path in files("dpn_rt/*/__init__.py", "dpn_rt/*/*/__init__.py"):
        if path.parent.name not in {"batch", "evaluate", "ops", "reference"}:
            assert not all_imported_modules(path) - {"__future__"}, path


def test_builders_know_only_the_engine_format() -> None:
    """They also know memory, the inputs and outputs of plans, chat templates and prompts, which they try out."""
    shared = {f"dpn_rt.backends.{name}" for name in ("tensorrt.library", "tensorrt.tensors", "tensorrt_llm.contract")}
    shared |= {f"dpn_rt.prompts.{name}" for name in ("template", "markers", "processor")}
    shared |= {"dpn_rt.device.huge_pages"}
    for path in files("builders/*.py", "builders/*/*.py"):
        more = {"terminal"} if path.name == "__main__.py" else set()
        known = {"errors", "schema", "model", "format", "builders", "backends", "prompts", "device"}
        assert packages(path) <= known | more, path
        restricted = ("dpn_rt.backends.", "dpn_rt.prompts.", "dpn_rt.device.")
        assert {name for name in imported_modules(path) if name.startswith(restricted)} <= shared, path


def test_tensorrt_is_imported_where_it_is_needed() -> None:
    """It is imported by name at run time, so that every module of the product can be imported without it."""
    for path in product_files():
        roots = {name.split(".")[0] for name in all_imported_modules(path)}
        assert not roots & {"tensorrt", "tensorrt_rtx_bindings", "tensorrt_rtx", "tensorrt_llm", "cuda"}, path


def test_ray_is_imported_where_it_is_used() -> None:
    """The base install does without; what `dpn_rt.batch` needs of it is imported when it is called."""
    for path in product_files():
        uses = "ray" in {name.split(".")[0] for name in all_imported_modules(path)}
        assert not uses or path.parent.name in {"ray_serve", "batch"}, path


def test_only_ops_import_the_extension() -> None:
    """So does `benchmarks.gpu_quick`, which says what was built."""
    for path in [*product_files(), *files("benchmarks/**/*.py")]:
        assert path.parent.name in {"ops", "gpu_quick"} or "_kernels" not in packages(path), path


def test_few_files_ask_for_cuda() -> None:
    """All others work with any device, so that they are tested without a GPU."""
    allowed = {"dpn_rt/device/cuda.py", "dpn_rt/backends/kernels/gpu.py", "dpn_rt/backends/tensorrt/cuda.py"}
    for path in product_files():
        if not {"reference", "builders", "tensorrt_llm"} & set(path.parts):
            uses = "torch.cuda" in path.read_text(encoding="utf-8")
            assert uses == (str(path.relative_to(ROOT)) in allowed), path


def test_the_decoder_sees_no_images() -> None:
    seen = {
        name for path in files("dpn_rt/model/decoder.py", "dpn_rt/model/layer.py") for name in imported_modules(path)
    }
    assert not {name.rsplit(".", 1)[-1] for name in seen} & {"visual_input", "image", "pooling", "layout"}
    assert not [name for name in seen if name.startswith("dpn_rt.model.vision")]


def test_few_files_name_an_encoder() -> None:
    """All others use the interface of encoders (`model/vision/encoder.py`), so a new encoder changes none of them."""
    encoders = {path.parent.name for path in files("dpn_rt/model/vision/*/config.py")}
    prefixes = tuple(f"dpn_rt.model.vision.{name}" for name in encoders)
    for path in product_files():
        relative = path.relative_to(ROOT)
        names_one = any(name.startswith(prefixes) for name in imported_modules(path))
        if not {"reference", "builders"} & set(relative.parts) and relative.parts[-2] not in encoders:
            assert names_one == (str(relative) == "dpn_rt/format/config.py"), path


def test_only_the_build_command_the_reference_and_training_read_checkpoints() -> None:
    for path in product_files():
        if path.name != "build.py" and not {"reference", "builders", "training"} & set(path.parts):
            assert "builders" not in packages(path), path
