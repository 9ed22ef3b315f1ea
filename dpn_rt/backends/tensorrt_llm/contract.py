"""The part of TensorRT-LLM's API that dpn_rt uses, by name and parameter. It is checked when it is first needed.

Versions 1.0 to 1.2 have it. Later versions of the package have no TensorRT backend.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch

from dpn_rt.errors import PlanError

PACKAGE = "tensorrt_llm"
OLDEST, TOO_NEW = (1, 0), (1, 3)
VERSIONS = "expected tensorrt_llm 1.0 to 1.2, the last with the TensorRT backend"


class Engine(Protocol):
    """The result of `tensorrt_llm.build`."""

    def save(self, engine_dir: str) -> None:
        """Writes `rank0.engine` and `config.json`."""


class Session(Protocol):
    """`tensorrt_llm.runtime.Session`: a loaded engine."""

    def infer_shapes(self, inputs: list[Any]) -> list[Any]:
        """Shapes of the outputs for the given inputs; both are lists of `TensorInfo`."""

    def run(self, inputs: dict[str, Any], outputs: dict[str, Any], stream: int) -> bool:
        """Queues a run on a CUDA stream. Returns False if it was refused."""


@dataclass(frozen=True)
class Call:
    """A class or function of the package, and the parameters that dpn_rt passes by name."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


CALLS = (
    Call(PACKAGE, "build", ("model", "build_config")),
    Call(f"{PACKAGE}.builder", "BuildConfig"),
    Call(f"{PACKAGE}.plugin", "PluginConfig"),
    Call(f"{PACKAGE}.bindings", "KVCacheType"),
    Call(f"{PACKAGE}.models.llama.config", "LLaMAConfig"),
    Call(f"{PACKAGE}.models.llama.model", "LLaMADecoderLayer", ("config", "layer_idx")),
    Call(f"{PACKAGE}.models.modeling_utils", "DecoderLayerList", ("cls", "config")),
    Call(f"{PACKAGE}.models.modeling_utils", "DecoderModelForCausalLM", ("config", "transformer", "lm_head")),
    Call(f"{PACKAGE}.models.generation_mixin", "GenerationMixin"),
    Call(f"{PACKAGE}.layers", "Attention"),
    Call(f"{PACKAGE}.layers", "AttentionParams", ("sequence_length", "context_lengths", "host_context_lengths")),
    Call(f"{PACKAGE}.layers", "ColumnLinear", ("in_features", "out_features", "bias", "dtype")),
    Call(f"{PACKAGE}.layers", "KeyValueCacheParams", ("past_key_value", "host_past_key_value_lengths")),
    Call(f"{PACKAGE}.layers", "RmsNorm", ("normalized_shape", "eps", "dtype")),
    Call(f"{PACKAGE}.module", "Module"),
    Call(f"{PACKAGE}.functional", "Tensor", ("name", "dtype", "shape", "dim_range")),
    Call(f"{PACKAGE}.functional", "gather_last_token_logits"),
    Call(f"{PACKAGE}._utils", "str_dtype_to_trt"),
    Call(f"{PACKAGE}._utils", "torch_dtype_to_trt"),
    Call(f"{PACKAGE}.runtime", "Session"),
    Call(f"{PACKAGE}.runtime", "TensorInfo", ("name", "dtype", "shape")),
)
METHODS = {
    "Session": ("from_serialized_engine", "infer_shapes", "run"),
    "Attention": ("fill_attention_params",),
    "GenerationMixin": ("get_profiles_ranges", "prepare_attention_inputs"),
    "DecoderModelForCausalLM": ("load",),
}


@dataclass(frozen=True)
class Surface:
    """The classes and functions of `CALLS` in the installed package."""

    version: str
    calls: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """A class or function of `CALLS` by its name."""
        try:
            return self.calls[name]
        except KeyError:
            raise AttributeError(name) from None


def load_surface() -> Surface:
    """Import TensorRT-LLM and check it.

    Raises:
        PlanError: the package is missing, its version has no TensorRT backend, there is no GPU, or calls are missing;
            names every missing call.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except (ImportError, OSError, RuntimeError) as error:
        raise PlanError(f"{PACKAGE} cannot be imported: {error}; {VERSIONS}") from error
    version = str(getattr(package, "__version__", "of unknown version"))
    check_version(version)
    if not torch.cuda.is_available():
        raise PlanError(f"{PACKAGE} {version} builds and runs engines on the GPU that is there, and there is none")
    return find_calls(package, version)


def check_version(version: str) -> None:
    """Refuse a version that lacks the TensorRT backend.

    Raises:
        PlanError: says which versions have it.
    """
    parts = version.split(".")
    found = tuple(int(part) for part in parts[:2]) if all(part.isdecimal() for part in parts[:2]) else ()
    if len(found) < 2 or not OLDEST <= found < TOO_NEW:
        raise PlanError(f"{PACKAGE} {version}: {VERSIONS}")


def find_calls(package: ModuleType, version: str) -> Surface:
    """Find every call of `CALLS`.

    Raises:
        PlanError: names every missing call, method and parameter.
    """
    found: dict[str, Any] = {}
    problems = []
    for call in CALLS:
        try:
            target = getattr(importlib.import_module(call.module), call.name)
        except (ImportError, AttributeError):
            problems.append(f"{call.module}.{call.name} is missing")
            continue
        found[call.name] = target
        problems += [f"{call.name}({name}=) is missing" for name in _lacking(target, call.parameters)]
        problems += [
            f"{call.name}.{method} is missing" for method in METHODS.get(call.name, ()) if not hasattr(target, method)
        ]
    if problems:
        raise PlanError(f"{package.__name__} {version} is not as expected: {'; '.join(problems)}; {VERSIONS}")
    return Surface(version, found)


def _lacking(target: Any, parameters: tuple[str, ...]) -> list[str]:
    """The `parameters` that `target` does not take. Empty where its signature is unknown or takes any parameter."""
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return []
    return [name for name in parameters if name not in known]
