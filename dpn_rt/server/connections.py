"""Limits of connections: how many there are, how much of one is not a body, how long a client may be silent."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpn_rt.errors import ConfigError

MIN_CONNECTIONS = 4
OWN_FILES = 24
"""File descriptors for what the server opens besides connections: images that it fetches, files that it reads."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of one server.

    Raises:
        ConfigError: a limit allows nothing.
    """

    max_connections: int = 1024
    """Requests that may be sent or answered at the same time; one beyond that gets 503, unless it asks for /health.
    Connections that wait for a request have no claim: the one that has waited longest is closed for a new one."""
    reserve: int = 16
    """Further connections, which /health can be asked on."""
    max_head_bytes: int = 2**16
    """Of a request line and its headers together."""
    max_headers: int = 100
    head_seconds: float = 10.0
    """For a request line and its headers, from the connection's first moment or the request's first byte."""
    body_seconds: float = 10.0
    """A body must get `min_body_bytes` further within this time, or to its end."""
    min_body_bytes: int = 4096
    unread_seconds: float = 60.0
    """For a client to read what has been sent, before the rest is dropped."""
    keep_alive_seconds: float = 30.0
    """Between two requests of a connection."""

    def __post_init__(self) -> None:
        for name in ("max_connections", "reserve", "max_head_bytes", "max_headers", "min_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("head_seconds", "body_seconds", "unread_seconds", "keep_alive_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected more than 0 seconds")


def within_open_files(limits: ConnectionLimits) -> int:
    """Connections for which the process may open files, the reserve included. Raises its own soft limit if it must.

    Raises:
        ConfigError: there are hardly any.
    """
    wanted = limits.max_connections + limits.reserve
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = used + wanted + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        # Under a hard limit that leaves little, what the server opens itself gets a third.
        left = soft - used
        wanted = min(wanted, max(left - OWN_FILES, left * 2 // 3))
    if wanted < MIN_CONNECTIONS:
        raise ConfigError(
            f"the process may open {soft} files (ulimit -n) and has opened {used}: expected at least "
            f"{used + MIN_CONNECTIONS * 2}"
        )
    return wanted


class ConnectionCounter:
    """Counts connections from the moment that they are accepted, and knows which of them only wait.

    Used on one event loop.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.max_open = limits.max_connections + limits.reserve
        self.open = 0
        self._waiting: OrderedDict[object, Callable[[], object]] = OrderedDict()
        """Connections without a request, the one that has waited longest first -> what closes it."""
        self.on_close: Callable[[], None] = lambda: None
        """Called after each connection that has ended."""

    @property
    def room(self) -> int:
        """Connections that may be accepted before one must go."""
        return self.max_open - self.open

    @property
    def busy(self) -> int:
        """Connections with a request that is sent or answered."""
        return self.open - len(self._waiting)

    @property
    def max_busy(self) -> int:
        """How many of them may ask for something else than /health."""
        return min(self.limits.max_connections, max(1, self.max_open - self.limits.reserve, self.max_open * 3 // 4))

    def accepted(self) -> None:
        """A connection has come."""
        self.open += 1

    def closed(self, connection: object | None) -> None:
        """A connection has ended."""
        self._waiting.pop(connection, None)
        self.open -= 1
        self.on_close()

    def waits(self, connection: object, close: Callable[[], object]) -> None:
        """A connection waits for a request from now on."""
        self._waiting[connection] = close
        self._waiting.move_to_end(connection)

    def works(self, connection: object) -> None:
        """The head of a request has come."""
        self._waiting.pop(connection, None)

    def make_room(self) -> bool:
        """Closes the connection that has waited longest if there is no room for another one.

        Returns:
            Whether there is room now. A connection that is closed makes room a moment later.
        """
        if self.room > 0:
            return True
        if self._waiting:
            _, close = self._waiting.popitem(last=False)
            close()
        return False
