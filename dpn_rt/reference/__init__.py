"""The same model in plain PyTorch: reference of the tests, baseline of the benchmarks, model to train."""

from __future__ import annotations

from dpn_rt.reference.boundary import Boundary, Router
from dpn_rt.reference.model import EagerDpn, EagerGeneration, EagerOutput
from dpn_rt.reference.trace import BoundaryRecord, PyramidTrace, SampleLayout
from dpn_rt.reference.training import language_loss, routing_loss

__all__ = [
    "Boundary",
    "BoundaryRecord",
    "EagerDpn",
    "EagerGeneration",
    "EagerOutput",
    "PyramidTrace",
    "Router",
    "SampleLayout",
    "language_loss",
    "routing_loss",
]
