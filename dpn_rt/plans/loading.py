"""An engine directory with plans -> the backend that runs them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpn_rt.engine_dir import EngineDir
from dpn_rt.errors import EngineError
from dpn_rt.model.pyramid import Boundary
from dpn_rt.model.rope import rope_table
from dpn_rt.plans import tensors
from dpn_rt.plans.backend import PlanBackend
from dpn_rt.plans.config import plan_file
from dpn_rt.plans.plan import PlanReader, check_signature
from dpn_rt.plans.slots import SlotCache, SlotMemory
from dpn_rt.plans.stage import LoadedPlan, PlanStage
from dpn_rt.plans.tensors import StagePlan, stage_plans


def load_plan_backend(
    engine: EngineDir,
    weights: Mapping[str, Tensor],
    on_host: Mapping[str, Tensor],
    reader: PlanReader,
    max_length: int,
) -> PlanBackend:
    """Weights and plans on the reader's device, with empty slots.

    Args:
        engine: with plans.
        weights: of the engine.
        on_host: those of them that are computed with on the CPU (`host_weights`).
        reader: of the plans.
        max_length: rows of one request at stage 0, at most.

    Raises:
        PlanError: a plan cannot be loaded, or does not match the model.
        CapacityError: the device has no room for the KV caches.
    """
    if engine.plans is None:
        raise EngineError(f"{engine.path}: has no plans: build it with --backend tensorrt")
    model, limits = engine.model, engine.plans.limits
    specs = stage_plans(model, limits)
    loaded = {(spec.stage, spec.phase): _load(engine, reader, spec) for spec in specs}
    embedding = on_host["embed_tokens.weight"]
    dtype = weights["embed_tokens.weight"].dtype
    prefills = [spec for spec in specs if spec.is_prefill]
    memory = SlotMemory.allocate(prefills, dtype, reader.device)
    cosines, sines = rope_table(model.decoder, prefills[0].num_positions).chunk(2, dim=1)
    table = {
        tensors.COSINES: cosines.contiguous().to(reader.device),
        tensors.SINES: sines.contiguous().to(reader.device),
    }
    stages = [
        PlanStage(
            loaded[spec.stage, "prefill"],
            loaded[spec.stage, "decode"],
            table | {name: weights[name].to(reader.device) for name in spec.weights()},
            memory,
        )
        for spec in prefills
    ]
    boundaries = [Boundary(model.pyramid, index, on_host) for index in range(len(model.pyramid.boundaries))]
    cache = SlotCache(limits, max_length, memory)
    return PlanBackend(embedding, stages, boundaries, cache, reader.device, dtype)


def host_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of an engine that are computed with on the CPU: all but the decoder's layers and head.

    In float32 where they are in float16, which the CPU kernels do not take.
    """
    return {
        name: weight.float() if weight.dtype == torch.float16 else weight
        for name, weight in weights.items()
        if not name.startswith(("layers.", "norm.", "lm_head."))
    }


def _load(engine: EngineDir, reader: PlanReader, spec: StagePlan) -> LoadedPlan:
    plan = reader.open((engine.path / plan_file(spec.stage, spec.phase)).read_bytes(), spec)
    check_signature(plan, spec)
    return LoadedPlan(spec, plan)
