"""Imports of packages that only some commands need, and of large ones."""

from __future__ import annotations

import gc
import importlib
import os
from types import ModuleType

from dpn_rt.errors import ConfigError, DpnError


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


def load_ray(module: str, purpose: str) -> ModuleType:
    """A module of Ray. A cluster that is started later sends no reports of use to Ray's makers, unless the environment
    asks for them (RAY_USAGE_STATS_ENABLED=1).

    Args:
        module: such as `ray.data`.
        purpose: what needs it, for the message.

    Raises:
        ConfigError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    load_package("ray", purpose, "ray", ConfigError)
    return importlib.import_module(module)


def import_large(module: str) -> ModuleType:
    """A module whose import takes seconds and makes some hundred thousand objects, which stay.

    To look for garbage among them meanwhile would take a quarter of the time. Whether the process collects garbage is
    afterwards as before.

    Args:
        module: such as `transformers.models.auto.image_processing_auto`.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if was_enabled:
            gc.enable()
