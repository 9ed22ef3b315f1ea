"""Packages of the extra `evaluate`, which the base install does without."""

from __future__ import annotations

from types import ModuleType

from dpn_rt.errors import EvaluationError
from dpn_rt.schema.packages import load_package


def need(package: str, purpose: str) -> ModuleType:
    """A package.

    Args:
        package: its name.
        purpose: what needs it, for the message.

    Raises:
        EvaluationError: it is not installed.
    """
    return load_package(package, purpose, "evaluate", EvaluationError)
