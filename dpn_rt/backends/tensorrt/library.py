"""Imports TensorRT when it is first needed, and collects its log."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from dpn_rt.errors import PlanError
from dpn_rt.format.plans import Flavor

MODULES: dict[Flavor, str] = {"rtx": "tensorrt_rtx_bindings", "enterprise": "tensorrt"}
_INSTALL: dict[Flavor, str] = {
    "rtx": "pip install --no-build-isolation -e '.[tensorrt]' in the repository (TensorRT-RTX 1.7.1 or newer)",
    "enterprise": "install TensorRT 10.15 or newer with its libraries",
}
_NEEDED = ("add_attention_v2", "add_kv_cache_update", "add_rotary_embedding")
_DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int32: "INT32",
}


def load_library(flavor: Flavor) -> ModuleType:
    """Import the Python module of a flavor of TensorRT.

    Raises:
        PlanError: the module is missing, does not load, or is too old: it lacks layers that the networks use.
    """
    try:
        library = importlib.import_module(MODULES[flavor])
    except (ImportError, OSError) as error:
        raise PlanError(f"{MODULES[flavor]} cannot be imported: {error}; {_INSTALL[flavor]}") from error
    missing = [name for name in _NEEDED if not hasattr(library.INetworkDefinition, name)]
    if missing:
        raise PlanError(f"{MODULES[flavor]} {library.__version__} has no {', '.join(missing)}: {_INSTALL[flavor]}")
    return library


def data_type(library: ModuleType, dtype: torch.dtype) -> Any:
    """TensorRT's `DataType` of a dtype."""
    return getattr(library.DataType, _DTYPES[dtype])


def torch_dtype(data_type: Any) -> torch.dtype:
    """The torch dtype of TensorRT's `DataType`.

    Raises:
        PlanError: plans of this runtime have no tensors of this type.
    """
    for dtype, name in _DTYPES.items():
        if data_type.name == name:
            return dtype
    raise PlanError(f"a tensor of type {data_type.name}: expected one of {', '.join(_DTYPES.values())}")


class Log:
    """Warnings and errors that the library logs while it builds, loads or runs a plan."""

    def __init__(self, library: ModuleType) -> None:
        self.lines: list[str] = []
        """Warnings and errors, oldest first."""
        self.logger = _make_logger(library, self.lines)
        """The `ILogger` for the library. It must live as long as the library uses it."""

    def explain(self, what: str) -> PlanError:
        """An error that ends with the library's last messages, errors before warnings."""
        errors_first = sorted(self.lines[-8:], key=lambda line: line.startswith("warning"))
        said = " | ".join(errors_first) or "the library gave no reason"
        return PlanError(f"{what}: {said}")


def _make_logger(library: ModuleType, lines: list[str]) -> Any:
    base: Any = library.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.INTERNAL_ERROR, base.ERROR, base.WARNING):
                lines.append(f"{severity.name.lower()}: {message.strip()}")

    return Logger()
