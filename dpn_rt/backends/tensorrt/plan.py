"""Interfaces of a loaded plan and of a plan reader. With other implementations of them, tests run without TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dpn_rt.backends.tensorrt.tensors import StagePlan
from dpn_rt.device.device import Device
from dpn_rt.errors import PlanError
from dpn_rt.format.plans import plan_file

Signature = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape, with -1 for dimensions that differ from call to call."""


class Plan(Protocol):
    """A loaded plan."""

    @property
    def inputs(self) -> Signature: ...

    @property
    def outputs(self) -> Signature: ...

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute the outputs into the given tensors.

        Args:
            inputs: one tensor for each of `self.inputs`, contiguous, on the reader's device.
            outputs: one for each of `self.outputs`. The tensor of a cache is the same as among the inputs.

        Raises:
            PlanError: the library refuses; gives the library's reason.
        """


class PlanReader(Protocol):
    """Opens the plans of one engine."""

    @property
    def device(self) -> Device:
        """Device of the plans' inputs and outputs."""

    def open(self, data: bytes, plan: StagePlan) -> Plan:
        """Load a serialized plan.

        Raises:
            PlanError: the library refuses it; gives the library's reason.
        """


def check_signature(plan: Plan, expected: StagePlan) -> None:
    """Compare a plan's inputs, weights included, and outputs with those that the engine's model has.

    Raises:
        PlanError: names every difference.
    """
    problems = []
    for kind, found, wanted in (
        ("input", plan.inputs, expected.inputs()),
        ("output", plan.outputs, expected.outputs()),
    ):
        problems += [f"{kind} {name} is missing" for name in wanted if name not in found]
        problems += [f"{kind} {name} is unexpected" for name in found if name not in wanted]
        for name, tensor in wanted.items():
            if name in found and found[name] != (tensor.dtype, tensor.shape):
                problems.append(f"{kind} {name}: expected {tensor.dtype} {tensor.shape}, got {found[name]}")
    if problems:
        name = plan_file(expected.stage, expected.phase)
        raise PlanError(f"{name} does not match the engine's model: {'; '.join(problems)}: build the engine again")
