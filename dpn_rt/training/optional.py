"""Packages that training needs, and the base install does without."""

from __future__ import annotations

import importlib
from types import ModuleType

from dpn_rt.errors import TrainingError


def need(package: str, purpose: str) -> ModuleType:
    """A package.

    Args:
        package: its name.
        purpose: what needs it, for the message.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"{purpose} needs the package {package}: in the repository, pip install --no-build-isolation -e '.[train]'"
        ) from error
