"""Addresses of hosts, and which of them are public."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a host name; raises OSError if it has none."""

IsAllowedAddress = Callable[[str], bool]

_EMBEDDED_IPV4 = {
    IPv6Network("::ffff:0:0/96"): 0,  # IPv4-mapped
    IPv6Network("64:ff9b::/96"): 0,  # NAT64, RFC 6052
    IPv6Network("2002::/16"): 80,  # 6to4
}
"""IPv6 networks that route to an embedded IPv4 address -> how many bits stand to the right of that address."""

_GLOBAL_UNICAST = IPv6Network("2000::/3")

# From IANA's special-purpose registries. Which of them the module ipaddress knows depends on the version of Python.
_SPECIAL_IPV4 = [IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24")]
_SPECIAL_IPV6 = [IPv6Network("2001::/23"), IPv6Network("2001:db8::/32"), IPv6Network("3fff::/20")]


def is_public_address(address: str) -> bool:
    """Whether `address`, and the IPv4 address that it embeds, if any, are globally routable unicast."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        special = ip.is_multicast or any(ip in network for network in _SPECIAL_IPV4)
        return ip.is_global and not special
    for network, shift in _EMBEDDED_IPV4.items():
        if ip in network:
            return is_public_address(str(IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
    return ip in _GLOBAL_UNICAST and ip.is_global and not any(ip in network for network in _SPECIAL_IPV6)


async def resolve_host(host: str) -> Sequence[str]:
    """The addresses of `host` in the system's order of preference.

    Raises:
        OSError: it has no address.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]
