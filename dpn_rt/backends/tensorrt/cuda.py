"""Loads and runs plans on a GPU. Of the modules about plans, this one alone has not been run yet."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpn_rt.backends.kernels.gpu import open_cuda_for_plans
from dpn_rt.backends.tensorrt.library import MODULES, Log, load_library, torch_dtype
from dpn_rt.backends.tensorrt.plan import Signature
from dpn_rt.backends.tensorrt.tensors import StagePlan
from dpn_rt.device.device import Device
from dpn_rt.errors import PlanError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.plans import PlanConfig, plan_file

ALIGNMENT = 256
"""Bytes. TensorRT needs this alignment of every address."""


def check_host(plans: PlanConfig, version: str, compute_capability: str | None) -> None:
    """Refuse plans that this machine cannot run.

    Args:
        plans: of the engine.
        version: of the installed TensorRT.
        compute_capability: of the GPU, such as `8.6`; None without a GPU.

    Raises:
        PlanError: names the version or the GPUs that the plans were built for.
    """
    name = MODULES[plans.flavor]
    if version != plans.version:
        raise PlanError(
            f"the plans were built by {name} {plans.version}, {version} is installed: install that version, or build "
            "the engine again"
        )
    wanted = ", ".join(plans.compute_capabilities)
    if compute_capability is None:
        raise PlanError(
            f"the plans run on GPUs of compute capability {wanted}, there is no GPU that torch can use: build the "
            "engine with --backend native"
        )
    if compute_capability not in plans.compute_capabilities:
        raise PlanError(
            f"the plans run on GPUs of compute capability {wanted}, this one has {compute_capability}: build the "
            f"engine again with --sm {compute_capability.replace('.', '')}"
        )


class CudaPlanReader:
    """A `PlanReader` for the current GPU."""

    def __init__(self, plans: PlanConfig, model: ModelConfig) -> None:
        """
        Raises:
            PlanError: the library is missing, or this machine cannot run the plans.
            ConfigError: the kernels between the plans do not run on this GPU.
        """
        self._library = load_library(plans.flavor)
        capability = None
        if torch.cuda.is_available():
            capability = "{}.{}".format(*torch.cuda.get_device_capability())
        check_host(plans, self._library.__version__, capability)
        self.device: Device = open_cuda_for_plans(model)
        """The current GPU."""
        self._log = Log(self._library)
        self._runtime = self._library.Runtime(self._log.logger)

    def open(self, data: bytes, plan: StagePlan) -> CudaPlan:
        """Load a serialized plan onto the GPU.

        Raises:
            PlanError: the library refuses it; gives the library's reason.
        """
        name = plan_file(plan.stage, plan.phase)
        engine = self._runtime.deserialize_cuda_engine(data)
        context = None if engine is None else engine.create_execution_context()
        if engine is None or context is None:
            raise self._log.explain(f"{name} cannot be loaded")
        return CudaPlan(self._library, self._log, name, engine, context)


class CudaPlan:
    """A `Plan` that runs on torch's current stream, on buffers that torch owns."""

    def __init__(self, library: ModuleType, log: Log, name: str, engine: Any, context: Any) -> None:
        self._log, self._name = log, name
        self._engine, self._context = engine, context
        self.inputs: Signature = self._signature(library.TensorIOMode.INPUT)
        self.outputs: Signature = self._signature(library.TensorIOMode.OUTPUT)

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Queue the plan on torch's current stream.

        Raises:
            PlanError: a shape or an address is refused, or the plan cannot be queued; gives the library's reason.
        """
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise self._log.explain(f"{self._name}: input {name} cannot be {list(tensor.shape)}")
        for name, tensor in (*inputs.items(), *outputs.items()):
            address = tensor.data_ptr()
            if address % ALIGNMENT or not tensor.is_contiguous():
                raise PlanError(
                    f"{self._name}: {name} {list(tensor.shape)} at {address:#x}: expected contiguous memory at a "
                    f"multiple of {ALIGNMENT} bytes"
                )
            if not self._context.set_tensor_address(name, address):
                raise self._log.explain(f"{self._name}: {name} is refused")
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise self._log.explain(f"{self._name} failed")

    def _signature(self, mode: Any) -> Signature:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {
            name: (torch_dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
            for name in names
            if engine.get_tensor_mode(name) == mode
        }
