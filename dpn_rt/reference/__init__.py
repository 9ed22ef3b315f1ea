"""The model in plain PyTorch, for training, as the reference of the tests and as the baseline of the benchmarks."""

from __future__ import annotations

from dpn_rt.reference.boundary import Boundary, Router
from dpn_rt.reference.model import EagerDpn
from dpn_rt.reference.outputs import EagerBatchOutput, EagerGeneration, EagerOutput
from dpn_rt.reference.trace import BoundaryRecord, PyramidTrace, SampleLayout
from dpn_rt.reference.training import language_loss, routing_loss

__all__ = [
    "Boundary",
    "BoundaryRecord",
    "EagerBatchOutput",
    "EagerDpn",
    "EagerGeneration",
    "EagerOutput",
    "PyramidTrace",
    "Router",
    "SampleLayout",
    "language_loss",
    "routing_loss",
]
