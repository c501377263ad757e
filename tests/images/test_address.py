"""Addresses that must not be asked: none of them is resolved, let alone connected to."""

from __future__ import annotations

import pytest

from textmill.errors import InvalidRequest
from textmill.images.address import hosts, parsed, public

ALLOWED = hosts(("images.example.org, CDN.example.org:8443", "localhost"))
FORBIDDEN = [
    "http://127.0.0.1/x.png",
    "http://127.1/x.png",
    "http://2130706433/x.png",
    "http://0x7f000001/x.png",
    "http://0x7f.1/x.png",
    "http://0177.0.0.1/x.png",
    "http://[::1]/x.png",
    "http://[::ffff:127.0.0.1]/x.png",
    "http://[fe80::1%25eth0]/x.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost./x.png",
    "http://images.example.org./x.png",
    "http://images.example.org@127.0.0.1/x.png",
    "http://user:pw@images.example.org/x.png",
    "http://images.example.org:22/x.png",
    "http://images.example.org:99999/x.png",
    "http://cdn.example.org/x.png",
    "http://evil.org/images.example.org",
    "http://images.example.org.evil.org/x.png",
    "http://images.example.org\\@evil.org/x.png",
    "http://images.example.org%2eevil.org/x.png",
    "http://images.exаmple.org/x.png",  # a Cyrillic letter
    "http://images.example.org/a b.png",
    "http://images.example.org/\r\nHost: evil.org",
    "http://-images.example.org/x.png",
    "http:///x.png",
    "https://",
    "ftp://images.example.org/x.png",
    "file:///etc/passwd",
    "gopher://images.example.org/x",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_forbidden(url: str) -> None:
    with pytest.raises(InvalidRequest, match="Could not fetch image: `") as error:
        parsed(url, ALLOWED)
    assert error.value.status == 422


def test_nothing_is_fetched_unless_hosts_are_named() -> None:
    with pytest.raises(InvalidRequest, match="this server fetches no images; send it as a data URL"):
        parsed("https://images.example.org/x.png", frozenset())


def test_named_hosts() -> None:
    address = parsed("https://IMAGES.example.org/a/b.png?c=1#d", ALLOWED)
    assert (address.host, address.port, address.target) == ("images.example.org", 443, "/a/b.png?c=1")
    assert parsed("http://cdn.example.org:8443", ALLOWED).port == 8443


@pytest.mark.parametrize(
    "ip",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "198.18.0.1", "192.0.2.1"],
)  # fmt: skip
def test_private_addresses(ip: str) -> None:
    assert not public(ip)


@pytest.mark.parametrize("ip", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses(ip: str) -> None:
    assert public(ip)
