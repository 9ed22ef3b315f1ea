"""Engines with plans on the CPU: instead of a plan on a GPU, the evaluator runs the stage's network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpn_rt import LLM
from dpn_rt.backends.tensorrt import cuda
from dpn_rt.backends.tensorrt.library import load_library, torch_dtype
from dpn_rt.backends.tensorrt.plan import Signature
from dpn_rt.backends.tensorrt.tensors import StagePlan
from dpn_rt.device.device import Device
from dpn_rt.device.host import HostDevice
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.plans import PHASES, BuiltPlans, PlanConfig, PlanLimits, plan_file
from dpn_rt.format.weight_spec import weight_spec
from tests.backends.tensorrt.evaluator import Evaluator, stage_network

NETWORK_DTYPE = "bfloat16"
"""Dtype of float32 engines' networks, since plans cannot be float32. The evaluator computes in float32 anyway."""


class EvaluatedPlan:
    """A `Plan` that evaluates the network from which the real plan would be built."""

    def __init__(self, spec: StagePlan) -> None:
        library = load_library("rtx")
        dtype = NETWORK_DTYPE if spec.model.dtype == "float32" else spec.model.dtype
        model = dataclasses.replace(spec.model, dtype=dtype)
        self._stage = stage_network(library, dataclasses.replace(spec, model=model))
        self._evaluator = Evaluator(library, self._stage.network)
        network = self._stage.network
        widen = spec.model.dtype == "float32"
        self.inputs: Signature = _signature([network.get_input(i) for i in range(network.num_inputs)], widen)
        self.outputs: Signature = _signature([network.get_output(i) for i in range(network.num_outputs)], widen)
        self._spec = spec

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        assert set(inputs) == set(self.inputs) and set(outputs) == set(self.outputs)
        for name, tensor in inputs.items():
            assert tensor.is_contiguous(), name
            largest = self._spec.inputs()[name].largest
            assert all(a <= b for a, b in zip(tensor.shape, largest, strict=True)), f"{name}: beyond the profile"
        for name, result in self._evaluator.run(inputs).items():
            assert outputs[name].shape == result.shape, name
            if name.endswith("_cache_out"):
                assert outputs[name].data_ptr() == inputs[name.removesuffix("_out")].data_ptr(), f"{name}: not in place"
            outputs[name].copy_(result)


def _signature(tensors: list[Any], widen: bool) -> Signature:
    """With `widen` every float tensor is float32, for the networks of float32 engines."""

    def dtype_of(tensor: Any) -> torch.dtype:
        dtype = torch_dtype(tensor.dtype)
        return torch.float32 if widen and dtype.is_floating_point else dtype

    return {tensor.name: (dtype_of(tensor), tuple(tensor.shape)) for tensor in tensors}


@dataclass(frozen=True)
class EvaluatingReader:
    """A `PlanReader` whose plans are evaluated on the CPU. It replaces `CudaPlanReader`."""

    plans: PlanConfig
    model: ModelConfig

    @property
    def device(self) -> Device:
        return HostDevice()

    def open(self, data: bytes, plan: StagePlan) -> EvaluatedPlan:
        assert data == f"stage {plan.stage} {plan.phase}".encode()
        return EvaluatedPlan(plan)


def limits_of(model: ModelConfig, rows: int = 768, max_batch: int = 8, max_prefill_batch: int = 3) -> PlanLimits:
    return PlanLimits(max_batch, max_prefill_batch, (rows,) * (len(model.stage_layers)))


def named_plans(model: ModelConfig, limits: PlanLimits | None = None) -> BuiltPlans:
    """Plans whose files name their stage and phase, for `EvaluatingReader`."""
    stages = range(len(model.stage_layers))
    files = {plan_file(stage, phase): f"stage {stage} {phase}".encode() for stage in stages for phase in PHASES}
    return BuiltPlans(PlanConfig("rtx", "1.7.1", ("8.6",), limits or limits_of(model)), files)


def write_plan_engine(
    path: Path, model: ModelConfig, weights: Mapping[str, Tensor], limits: PlanLimits | None = None
) -> Path:
    """An engine directory with `named_plans`."""
    ordered = [(name, weights[name]) for name in weight_spec(model)]
    write_engine(path, model, EngineSource("0" * 64, "synthetic"), ordered, plans=named_plans(model, limits))
    return path


def evaluated_llm(path: Path, patch: pytest.MonkeyPatch, **options: Any) -> LLM:
    """`LLM` on the engine at `path`, with evaluated plans."""
    patch.setattr(cuda, "CudaPlanReader", EvaluatingReader)
    return LLM(path, **options)


def logprob_error(output: Any, expected: Tensor) -> float:
    """Largest difference between log-probabilities `[num_tokens, vocab_size]`; chosen tokens do not matter."""
    positions = output.outputs[0].logprobs
    found = torch.tensor(
        [[position[token].logprob for token in range(expected.shape[1])] for position in positions], dtype=torch.float64
    )
    assert torch.isfinite(found).all()
    return float((found - expected).abs().max())
