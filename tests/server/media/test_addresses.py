"""Only globally routable addresses pass, also when they are embedded in other addresses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt.server.media.addresses import is_public_address

PUBLIC = """
8.8.8.8 93.184.215.14 2606:4700::1111 2a00:1450:4001::200e ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""

NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.1 192.0.0.9 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1
224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:0:127.0.0.1
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::
100::1 2001::1 2001:0:808:808::1 2001:10::1 2001:20::1 2001:db8::1 3fff::1 4000::1 5f00::1
fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1
localhost 127.1 0x7f.0.0.1 2130706433 1.2.3.4.5 8.8.8.8/32 [::1]
"""


def addresses_in(networks: list[tuple[int, int]]) -> st.SearchStrategy[IPv6Address]:
    """IPv6 addresses that start with one of the (prefix, length in bits)."""
    return st.sampled_from(networks).flatmap(
        lambda network: st.integers(0, 2 ** (128 - network[1]) - 1).map(
            lambda rest: IPv6Address(network[0] << 128 - network[1] | rest)
        )
    )


INTERESTING = [(prefix, 16) for prefix in (0x2001, 0x2002, 0x2600, 0x64, 0xFE80, 0xFC00, 0xFF02)]
EMBEDDING = [(0, 96), (0xFFFF, 96), (0x64FF9B << 64, 96)]


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize("address", ["", *NOT_PUBLIC.split()])
def test_not_public(address: str) -> None:
    assert not is_public_address(address)


@given(st.ip_addresses() | addresses_in(INTERESTING) | addresses_in(EMBEDDING))
def test_nothing_passes_that_ipaddress_calls_special(ip: IPv4Address | IPv6Address) -> None:
    if is_public_address(str(ip)):
        inner = next((IPv4Address(value & 0xFFFFFFFF) for value in embedded(ip)), ip)
        assert inner.is_global
        assert not (inner.is_private or inner.is_loopback or inner.is_link_local or inner.is_multicast)
        assert not (inner.is_reserved or inner.is_unspecified)


@given(st.one_of(st.ip_addresses(v=4), st.sampled_from(["10.0.0.1", "8.8.8.8", "127.0.0.1"]).map(IPv4Address)))
def test_an_embedded_address_counts_as_itself(ip: IPv4Address) -> None:
    for wrapped in (0xFFFF << 32 | int(ip), 0x64FF9B << 96 | int(ip), 0x2002 << 112 | int(ip) << 80):
        assert is_public_address(str(IPv6Address(wrapped))) == is_public_address(str(ip))


def embedded(ip: IPv4Address | IPv6Address) -> list[int]:
    """The IPv4 addresses of mapped, NAT64 and 6to4 addresses."""
    bits = int(ip)
    if isinstance(ip, IPv4Address):
        return []
    if ip.ipv4_mapped or bits >> 32 == 0x64FF9B << 64:
        return [bits]
    return [bits >> 80] if ip.sixtofour else []
