"""Which names a server answers to: the Host header, as RFC 9112 (3.2) wants it, against a list of names.

A page of the internet can let a name of its own resolve to the reader's machine (DNS rebinding). Its requests then
reach a local server from the same origin, but with that name as their host.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.types import Scope

from dpn_rt.errors import ConfigError
from dpn_rt.server.errors import HttpError

ALL = "*"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[a-zA-Z0-9._-]{1,255})(?::\d{0,5})?")
_NAME = re.compile(r"[a-z0-9._-]{1,255}|[0-9a-f:.]{2,45}")


@dataclass(frozen=True)
class AllowedHosts:
    """Names and addresses that requests may have as their host."""

    names: frozenset[str]
    """Lower case, without ports and brackets; `*` for all."""
    any_address: bool = False
    """Every IP address as well. No rebinding can use one: only a name can be made to resolve to another machine."""

    @classmethod
    def of(cls, names: Sequence[str]) -> AllowedHosts:
        """Those that an operator names.

        Raises:
            ConfigError: a name would match no request.
        """
        known = [name.lower().removeprefix("[").removesuffix("]") for name in names]
        for given, name in zip(names, known, strict=True):
            if name != ALL and not (_NAME.fullmatch(name) and (":" not in name or _is_address(name))):
                raise ConfigError(
                    f"allowed_hosts: {given!r:.80} would match no request, expected a host name or address without "
                    "scheme, port and path, such as 'dpn.example.com', or '*'"
                )
        return cls(frozenset(known))

    @classmethod
    def of_address(cls, host: str) -> AllowedHosts:
        """The names of an address that a server listens on."""
        own = frozenset({host.lower(), "localhost"})
        if not _is_address(host):
            return cls(own)
        address = ip_address(host)
        if address.is_loopback:
            return cls(own | {"127.0.0.1", "::1"})
        own |= {socket.gethostname().lower()}
        return cls(own | {"127.0.0.1", "::1"}, any_address=True) if address.is_unspecified else cls(own)

    def check(self, scope: Scope) -> None:
        """Checks the version of HTTP and the host of a request.

        Raises:
            HttpError: 400, the version is unknown, there is not one host, or it is none of these.
        """
        version = scope["http_version"]
        if version not in ("1.0", "1.1"):
            raise HttpError(400, f"HTTP/{version}: expected HTTP/1.1")
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"]
        if not hosts and version == "1.0":  # which did not know the header; every browser sends it
            return
        if len(hosts) != 1:
            raise HttpError(400, f"{len(hosts)} Host headers: expected one")
        found = _HOST.fullmatch(hosts[0])
        if not found:
            raise HttpError(400, f"Host {hosts[0]!r:.80}: expected a host name or address, and a port if need be")
        name = found[1].lower().strip("[]").removesuffix(".")
        if not self._allows(name):
            raise HttpError(400, f"Host {name!r:.80}: not a name of this server, see its option --allowed-hosts")

    def _allows(self, name: str) -> bool:
        return ALL in self.names or name in self.names or (self.any_address and _is_address(name))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
