"""Which addresses are public: IANA's registries of special addresses as a table, and what holds for every address."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphbuild.sources.hosts import is_public

# First and last address of each block (RFC 6890 and the registries that it began; RFC 8215; RFC 9637).
SPECIAL = [
    ("0.0.0.0", "0.255.255.255"),  # this network
    ("10.0.0.0", "10.255.255.255"),  # private
    ("100.64.0.0", "100.127.255.255"),  # shared by a carrier's customers
    ("127.0.0.0", "127.255.255.255"),  # loopback
    ("169.254.0.0", "169.254.255.255"),  # link-local, with the clouds' metadata
    ("172.16.0.0", "172.31.255.255"),  # private
    ("192.0.0.0", "192.0.0.255"),  # protocol assignments
    ("192.0.2.0", "192.0.2.255"),  # documentation
    ("192.88.99.0", "192.88.99.255"),  # relays of 6to4, given up by RFC 7526
    ("192.168.0.0", "192.168.255.255"),  # private
    ("198.18.0.0", "198.19.255.255"),  # benchmarks
    ("198.51.100.0", "198.51.100.255"),  # documentation
    ("203.0.113.0", "203.0.113.255"),  # documentation
    ("224.0.0.0", "239.255.255.255"),  # multicast
    ("240.0.0.0", "255.255.255.255"),  # reserved, broadcast
    ("::", "::1"),  # unspecified, loopback
    ("::2", "::fffe:ffff:ffff"),  # IPv4-compatible, given up by RFC 4291
    ("64:ff9b:1::", "64:ff9b:1:ffff:ffff:ffff:ffff:ffff"),  # a network's own NAT64
    ("100::", "100::ffff:ffff:ffff:ffff"),  # discarded
    ("2001::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff"),  # Teredo, benchmarks, ORCHID
    ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),  # documentation
    ("2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # 6to4
    ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff"),  # documentation
    ("5f00::", "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # segment routing
    ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # private
    ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # link-local
    ("fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # private once
    ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # multicast
]
RANGES = [(ipaddress.ip_address(first), ipaddress.ip_address(last)) for first, last in SPECIAL]
PUBLIC = """
8.8.8.8 93.184.216.34 1.1.1.1 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
169.253.255.255 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255
198.20.0.0 223.255.255.255 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2000:: 2001:200:: 2001:4860:4860::8888 2003::
2606:2800:220:1::1 3ffe:: 3fff:1000::
"""


@pytest.mark.parametrize(("first", "last"), SPECIAL)
def test_special_addresses_are_not_public(first: str, last: str) -> None:
    assert not is_public(first)
    assert not is_public(last)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_addresses_beside_them_are(address: str) -> None:
    assert is_public(address)


def test_a_zone_is_no_part_of_an_address() -> None:
    assert not is_public("fe80::1%eth0")


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_public_where_no_special_block_holds_it_however_it_is_wrapped(
    ip: ipaddress.IPv4Address,
) -> None:
    expected = not any(ip.version == first.version and int(first) <= int(ip) <= int(last) for first, last in RANGES)
    assert [is_public(f"{prefix}{ip}") for prefix in ("", "::ffff:", "64:ff9b::")] == [expected] * 3
    assert not any(is_public(f"{prefix}{ip}") for prefix in ("::", "64:ff9b:1::", "2001::", "fe80::"))


@settings(deadline=None)
@given(st.ip_addresses(v=6))
def test_an_ipv6_address_is_public_only_in_the_part_that_is_assigned(ip: ipaddress.IPv6Address) -> None:
    special = any(ip.version == first.version and int(first) <= int(ip) <= int(last) for first, last in RANGES)
    if int(ip) >> 125 == 0b001:
        assert is_public(str(ip)) == (not special)
    elif not (ip.ipv4_mapped or int(ip) >> 32 == int(ipaddress.ip_address("64:ff9b::")) >> 32):
        assert not is_public(str(ip))


@settings(deadline=None)
@given(st.ip_addresses())
def test_what_python_holds_for_local_is_not_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    mapped = isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped
    if not mapped and (not ip.is_global or ip.is_multicast):
        assert not is_public(str(ip))
