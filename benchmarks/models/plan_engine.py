"""A benchmark's engine with TensorRT plans for the GPU of this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from dpn_rt.builders.tensorrt.plans import build_plans
from dpn_rt.errors import PlanError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir, EngineSource, weight_spec, write_engine
from dpn_rt.format.plans import Flavor, PlanLimits


def write_plan_engine(source: Path, target: Path, model: ModelConfig, batch: int, rows: int) -> Path:
    """Write the engine at `source` with plans to `target`, replacing an engine that is there.

    The plans take `batch` sequences of `rows` rows in every stage. They are TensorRT's where it is installed, else
    TensorRT-RTX's.

    Raises:
        PlanError: there is no GPU, or the library is missing or refuses.
        ConfigError: the library has no kernels for this GPU or dtype.
    """
    if not torch.cuda.is_available():
        raise PlanError("plans run on GPUs alone, and there is none")
    flavor: Flavor = "rtx" if importlib.util.find_spec("tensorrt") is None else "enterprise"
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    limits = PlanLimits(batch, batch, (rows,) * len(model.stage_layers))
    plans = build_plans(model, flavor, [capability], limits)
    weights = EngineDir.open(source, verify=False).load_weights()
    ordered = ((name, weights[name]) for name in weight_spec(model))
    write_engine(target, model, EngineSource("0" * 64, "synthetic"), ordered, plans=plans, force=True)
    return target
