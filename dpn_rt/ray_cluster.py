"""The Ray cluster that a command works on: one that runs already, or a new one on this machine."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dpn_rt.errors import ConfigError
from dpn_rt.schema.files import real_path
from dpn_rt.schema.packages import load_ray

MAX_TEMP_DIR_BYTES = 43
"""Of `--ray-temp-dir`: the path of a socket below it, `session_<date>_<time>_<process>/sockets/plasma_store`, has 64
bytes more, and Linux takes 107."""
_OWN_ERROR = re.compile(r"^(?:.*\s)?dpn_rt\.errors\.\w+: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class RayCluster:
    """Which cluster a command works on."""

    address: str | None = None
    """Of a running one; None: $RAY_ADDRESS, or a new one here."""
    temp_dir: Path | None = None
    """Where a new one keeps its files; None: /tmp/ray."""

    @property
    def runs_already(self) -> bool:
        """Whether it is joined, and not started."""
        return self.address is not None or "RAY_ADDRESS" in os.environ

    @contextmanager
    def connected(self, purpose: str) -> Iterator[ModuleType]:
        """Joins the cluster or starts it, and gives the module `ray`. At the end it is left, or stopped.

        Where the calling program has joined one already, that is taken and kept.

        Args:
            purpose: what needs Ray, for messages.

        Raises:
            ConfigError: Ray is not installed, there is no cluster at the address, or none can be started.
        """
        ray = load_ray("ray", purpose)
        if ray.is_initialized():
            yield ray
            return
        if self.runs_already:
            self._join(ray)
        else:
            ray.init("local", include_dashboard=False, _temp_dir=self._checked_temp_dir())
        try:
            yield ray
        finally:
            ray.shutdown()

    def _join(self, ray: ModuleType) -> None:
        try:
            ray.init(self.address)
        except (ConnectionError, ValueError) as error:
            address = self.address or f"(RAY_ADDRESS) {os.environ['RAY_ADDRESS']}"
            raise ConfigError(f"--ray-address {address}: no Ray cluster can be reached there") from error

    def _checked_temp_dir(self) -> str | None:
        """The folder of a new cluster, made where there is none."""
        if self.temp_dir is None:
            return None
        folder = real_path(self.temp_dir)
        length = len(os.fsencode(folder))
        if length > MAX_TEMP_DIR_BYTES:
            raise ConfigError(
                f"--ray-temp-dir {folder}: {length} bytes long, expected at most {MAX_TEMP_DIR_BYTES}: the paths of "
                "Ray's sockets are below it"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--ray-temp-dir {folder}: cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--ray-temp-dir {folder}: expected a folder that can be written to")
        return str(folder)


def check_share(given: str, share: object) -> None:
    """Refuses a number of cores or GPUs of one engine that Ray could not give out.

    Args:
        given: the option with its value, for the message.
        share: the value.

    Raises:
        ConfigError: it is no number, below 0, infinite or NaN.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
        raise ConfigError(f"{given}: expected a number, 0 or more")


def copies_weights(asked: bool | None, engines: int) -> bool | None:
    """`copy_weights` of each of several engines. Those that start at one time would all find the same memory free, so
    they share the weights' file unless copies are asked for.

    Args:
        asked: True, False, or None for the default.
        engines: at one time.
    """
    return False if asked is None and engines > 1 else asked


def check_room(ray: Any, engines: str, count: int, cpus: tuple[str, float], gpus: tuple[str, float]) -> None:
    """Refuses engines for which a cluster has no room: Ray would wait for it without an end.

    Args:
        ray: the module, connected.
        engines: such as "2 replicas".
        count: of engines.
        cpus: how cores were asked for, such as "--cpus-per-replica 4"; cores of each engine.
        gpus: the same of GPUs.

    Raises:
        ConfigError: they need more than there is.
    """
    there = ray.cluster_resources()
    for resource, name, (asked, each) in (("CPU", "cores", cpus), ("GPU", "GPUs", gpus)):
        if count * each > there.get(resource, 0.0):
            raise ConfigError(
                f"{engines} with {asked} need {count * each:g} {name}: expected at most "
                f"{there.get(resource, 0.0):g}, which the cluster has"
            )


def own_message(error: BaseException) -> str | None:
    """What an error of ours said in another process, in the text of the one that Ray brings from there."""
    found = _OWN_ERROR.findall(str(error))
    return str(found[-1]) if found else None
