"""Packages that some commands need, and the base install does without."""

from __future__ import annotations

import importlib
from types import ModuleType

from dpn_rt.errors import DpnError


def load_package(package: str, purpose: str, extra: str, error: type[DpnError]) -> ModuleType:
    """A package.

    Args:
        package: its name.
        purpose: what needs it, for the message.
        extra: of this product, with which it is installed.
        error: what is raised where it is not.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as missing:
        raise error(
            f"{purpose} needs the package {package}: in the repository, "
            f"pip install --no-build-isolation -e '.[{extra}]'"
        ) from missing
