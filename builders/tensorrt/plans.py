"""Builds plans from networks, for given compute capabilities. TensorRT-RTX needs no GPU for this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from dpn_rt.backends.tensorrt.library import Log, load_library
from dpn_rt.backends.tensorrt.tensors import DYNAMIC, PlanTensor, StagePlan
from dpn_rt.builders.tensorrt.network import define_network
from dpn_rt.errors import ConfigError, PlanError
from dpn_rt.format.config import OLDEST_CAPABILITY, ModelConfig
from dpn_rt.format.plans import (
    PHASES,
    BuiltPlans,
    Flavor,
    PlanConfig,
    PlanLimits,
    check_limits,
    plan_file,
)
from dpn_rt.model.config import DecoderConfig

OPTIMAL_BATCH = 1
"""Batch size that the plans are tuned for, which favours the latency of a single request."""


def build_plans(
    model: ModelConfig,
    flavor: Flavor,
    compute_capabilities: Sequence[str],
    limits: PlanLimits,
    progress: Callable[[str], None] = lambda name: None,
) -> BuiltPlans:
    """Every plan of a model: one per stage and phase.

    Args:
        compute_capabilities: of the GPUs to build for, such as `8.6` or `86`.
        progress: is called with the file name of each plan once it is built.

    Raises:
        ConfigError: limits or compute capabilities that no plan can be built for.
        PlanError: the library is missing, or refuses; the message has the library's own.
    """
    check_limits(limits, len(model.stage_layers), model.decoder.max_position_embeddings)
    _check_decoder(model.decoder, limits)
    if model.dtype == "float32":
        raise ConfigError("TensorRT has no float32 attention kernels: expected --dtype bfloat16 or float16")
    library = load_library(flavor)
    targets = tuple(normal_capability(capability) for capability in compute_capabilities)
    _check_age(targets)
    files = {}
    for stage in range(len(limits.stage_rows)):
        for phase in PHASES:
            name = plan_file(stage, phase)
            files[name] = build_plan(library, StagePlan(model, limits, stage, phase), targets)
            progress(name)
    return BuiltPlans(PlanConfig(flavor, library.__version__, targets, limits), files)


def _check_decoder(decoder: DecoderConfig, limits: PlanLimits) -> None:
    """Refuse what the networks of stages do not compute.

    Raises:
        ConfigError: names it, and the rows with which a sliding window hides nothing.
    """
    if decoder.qk_norm:
        raise ConfigError(
            "TensorRT plans have no norms of heads, which the decoder needs (Qwen3): use --backend native"
        )
    windows = decoder.for_length(max(limits.stage_rows)).windows
    if windows:
        shortest = min(filter(None, windows))
        raise ConfigError(
            f"TensorRT plans have no sliding windows: rows per stage {list(limits.stage_rows)}, expected at most the "
            f"window of {shortest}; or use --backend native"
        )


def build_plan(library: ModuleType, plan: StagePlan, compute_capabilities: Sequence[str]) -> bytes:
    """One plan, serialized.

    Raises:
        ConfigError: a compute capability that the library cannot build for.
        PlanError: the library refuses; the message has the library's own.
    """
    log = Log(library)
    builder = library.Builder(log.logger)
    network = create_network(library, builder)
    graph = define_network(library, network, plan)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, plan))
    _set_targets(library, config, compute_capabilities)
    serialized = builder.build_serialized_network(network, config)
    del graph
    if serialized is None:
        raise log.explain(f"{plan_file(plan.stage, plan.phase)} cannot be built for {', '.join(compute_capabilities)}")
    return bytes(serialized)


def create_network(library: ModuleType, builder: Any) -> Any:
    """An empty, strongly typed network, in which tensors have exactly the types that layers give them."""
    return builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def normal_capability(text: str) -> str:
    """A compute capability in the form `8.6`, given in that form, as `86` or as `sm_86`.

    Raises:
        ConfigError: it has none of these forms.
    """
    digits = text.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isdecimal() or len(digits) < 2:
        raise ConfigError(f"compute capability {text!r}: expected one such as 86 or 8.6")
    return f"{digits[:-1]}.{digits[-1]}"


def _check_age(compute_capabilities: Sequence[str]) -> None:
    oldest = ".".join(map(str, OLDEST_CAPABILITY))
    for capability in compute_capabilities:
        if tuple(map(int, capability.split("."))) < OLDEST_CAPABILITY:
            raise ConfigError(
                f"compute capability {capability}: expected {oldest} or newer, for the kernels between the plans"
            )


def _profile(builder: Any, plan: StagePlan) -> Any:
    profile = builder.create_optimization_profile()
    for name, tensor in plan.inputs().items():
        if DYNAMIC in tensor.shape:
            profile.set_shape(name, _sized(tensor, 1, 1), _optimal(plan, tensor), tensor.largest)
    return profile


def _optimal(plan: StagePlan, tensor: PlanTensor) -> tuple[int, ...]:
    return _sized(tensor, min(OPTIMAL_BATCH, plan.max_batch), plan.max_rows)


def _sized(tensor: PlanTensor, batch: int, rows: int) -> tuple[int, ...]:
    """The shape with its dynamic dimensions replaced by `batch` and `rows`, in this order."""
    sizes = iter((batch, rows))
    return tuple(next(sizes) if size == DYNAMIC else size for size in tensor.shape)


def _set_targets(library: ModuleType, config: Any, compute_capabilities: Sequence[str]) -> None:
    """Set the GPUs to build for: TensorRT-RTX builds for any, TensorRT only for this machine's GPU."""
    if not compute_capabilities:
        raise ConfigError("no compute capability to build for: name at least one, such as 86")
    if not hasattr(config, "set_compute_capability"):
        _check_current(compute_capabilities)
        return
    known = {name: value for name, value in library.ComputeCapability.__members__.items() if name.startswith("SM")}
    names = ["SM" + capability.replace(".", "") for capability in compute_capabilities]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"TensorRT-RTX {library.__version__} cannot build for {', '.join(unknown)}: expected some of "
            f"{', '.join(known)}"
        )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(known[name], index):
            raise PlanError(f"TensorRT-RTX {library.__version__} refuses to build for {name}")


def _check_current(compute_capabilities: Sequence[str]) -> None:
    if not torch.cuda.is_available():
        raise PlanError("TensorRT builds for the GPU that it runs on, and there is none: use the flavor rtx")
    current = "{}.{}".format(*torch.cuda.get_device_capability())
    if list(compute_capabilities) != [current]:
        raise ConfigError(
            f"compute capabilities {', '.join(compute_capabilities)}: TensorRT builds for the GPU that it runs on, "
            f"expected {current}"
        )
