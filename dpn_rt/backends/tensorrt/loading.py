"""Loads an engine directory with plans and makes the backend that runs them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpn_rt.backends.kernels.loading import image_encoder, place_weights
from dpn_rt.backends.tensorrt import tensors
from dpn_rt.backends.tensorrt.backend import PlanBackend
from dpn_rt.backends.tensorrt.plan import PlanReader, check_signature
from dpn_rt.backends.tensorrt.slots import SlotCache, SlotMemory
from dpn_rt.backends.tensorrt.stage import LoadedPlan, PlanStage
from dpn_rt.backends.tensorrt.tensors import StagePlan, stage_plans
from dpn_rt.device.device import Device
from dpn_rt.errors import CapacityError, EngineError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.plans import PlanLimits, plan_file
from dpn_rt.model.decoder_weights import EMBED_TOKENS, FINAL_NORM, LAYERS, LM_HEAD
from dpn_rt.model.reduction.loading import load_reducers
from dpn_rt.model.rope import rope_table
from dpn_rt.model.vision.encoder import VisionEncoder, load_encoder
from dpn_rt.schema.files import open_file

EMBEDDING = f"{EMBED_TOKENS}.weight"


def load_plan_backend(
    engine: EngineDir, weights: Mapping[str, Tensor], reader: PlanReader
) -> tuple[PlanBackend, VisionEncoder | None]:
    """Load weights and plans onto the reader's device, with empty slots.

    Args:
        engine: with plans.
        weights: canonical name -> tensor, on the CPU.
        reader: of the plans.

    Returns:
        The backend, and the vision encoder; None for a model without one.

    Raises:
        EngineError: the engine has no plans.
        PlanError: a plan cannot be loaded, or does not match the model.
        CapacityError: the device has no room for weights, KV caches or the vision tower's graphs.
    """
    if engine.plans is None:
        raise EngineError(f"{engine.path}: has no plans: build it with --backend tensorrt")
    try:
        return _load_backend(engine, engine.plans.limits, weights, reader)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{reader.device.torch_device} ran out of memory while plans, tables and the vision tower's graphs were "
            f"loaded after weights and KV caches: build the engine with a lower --max-batch or --max-rows ({error})"
        ) from error


def _load_backend(
    engine: EngineDir, limits: PlanLimits, weights: Mapping[str, Tensor], reader: PlanReader
) -> tuple[PlanBackend, VisionEncoder | None]:
    model, device = engine.model, reader.device
    specs = stage_plans(model, limits)
    loaded = {(spec.stage, spec.phase): _load(engine, reader, spec) for spec in specs}
    dtype = weights[EMBEDDING].dtype
    placed = place_weights(weights, device, dtype)
    between = between_plans(placed, device)
    prefills = [spec for spec in specs if spec.is_prefill]
    memory = SlotMemory.allocate(prefills, dtype, device.torch_device)
    table = rope_table(model.decoder, prefills[0].num_positions).to(device.torch_device)
    cosines, sines = (part.contiguous() for part in table.chunk(2, dim=1))
    stages = [
        PlanStage(
            loaded[spec.stage, "prefill"],
            loaded[spec.stage, "decode"],
            {tensors.COSINES: cosines, tensors.SINES: sines} | {name: placed[name] for name in spec.weights()},
            memory,
            device,
            dtype,
        )
        for spec in prefills
    ]
    reducers = load_reducers(model.reduction, between, device)
    backend = PlanBackend(between[EMBEDDING], stages, reducers, SlotCache(limits, memory), device)
    return backend, image_encoder(load_encoder(model.vision, model.projector, between, prepack=False), device)


def between_plans(weights: Mapping[str, Tensor], device: Device) -> dict[str, Tensor]:
    """The weights that are used outside the plans: all but those of the decoder's layers, final norm and head.

    On the CPU, whose kernels do not take float16, float16 weights are converted to float32.
    """
    widens = device.torch_device.type == "cpu"
    return {
        name: weight.float() if widens and weight.dtype == torch.float16 else weight
        for name, weight in weights.items()
        if not name.startswith((f"{LAYERS}.", f"{FINAL_NORM}.", f"{LM_HEAD}."))
    }


def _load(engine: EngineDir, reader: PlanReader, spec: StagePlan) -> LoadedPlan:
    with open_file(engine.path / plan_file(spec.stage, spec.phase), EngineError) as file:
        plan = reader.open(file.read(), spec)
    check_signature(plan, spec)
    return LoadedPlan(spec, plan)
