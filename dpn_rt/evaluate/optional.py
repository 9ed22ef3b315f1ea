"""Packages that some commands need, and the base install does without."""

from __future__ import annotations

import importlib
from types import ModuleType

from dpn_rt.errors import EvaluationError


def need(package: str, purpose: str) -> ModuleType:
    """A package.

    Args:
        package: its name.
        purpose: what needs it, for the message.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{purpose} needs the package {package}: in the repository, "
            "pip install --no-build-isolation -e '.[evaluate]'"
        ) from error
