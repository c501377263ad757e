"""Where a picture comes from: the address in the prompt, and whether anything at all may be fetched from it.

Nothing is resolved here. The rules are for addresses from strangers: only https and http, only hosts that the operator
has named, never an IP address in any spelling, no user, no port but the scheme's own or one that was named.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from textmill.errors import InvalidRequest

SHOWN = 48  # characters of an address that an error repeats
PORTS = {"http": 80, "https": 443}
LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
PLAIN = re.compile(r"[\x21-\x7e]+")  # no spaces, no control characters, nothing that needs an encoding


@dataclass(frozen=True, slots=True)
class Address:
    """A host that may be asked for `target` (path and query)."""

    scheme: str
    host: str
    port: int
    target: str


def shortened(text: str) -> str:
    """As an error shows it: the beginning, in printable characters."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[:SHOWN])
    return f"`{plain}`" if len(text) <= SHOWN else f"`{plain}…`"


def parsed(url: str, allowed: frozenset[str]) -> Address:
    """The address of a picture, if it may be fetched from one of `allowed` ("host" or "host:port").

    Raises InvalidRequest.
    """
    shown = shortened(url)
    if not PLAIN.fullmatch(url) or "\\" in url:
        raise refusal(shown, "it has characters that an address cannot have")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refusal(shown, "it is no address") from None
    if parts.scheme not in PORTS:
        raise refusal(shown, "only http and https addresses are fetched")
    if "@" in parts.netloc:
        raise refusal(shown, "it names a user")
    host = checked_host(shown, parts.hostname or "")
    own = PORTS[parts.scheme]
    permitted(shown, host, port if port is not None else own, own, allowed)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.scheme, host, own if port is None else port, target)


def checked_host(shown: str, host: str) -> str:
    """A name of the kind that the domain name system has, which no IP address in any spelling is."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        # The last label of a name has a letter first (RFC 3696): 127.1, 0x7f.1 and 2130706433 are no names.
        if all(LABEL.fullmatch(label) for label in labels) and labels[-1][:1].isalpha() and len(host) <= 253:
            return host
        raise refusal(shown, "its host is no plain name") from None
    raise refusal(shown, "its host is an IP address")


def permitted(shown: str, host: str, port: int, own: int, allowed: frozenset[str]) -> None:
    if not allowed:
        raise refusal(shown, "this server fetches no images; send it as a data URL (--allow-remote-images names hosts)")
    if f"{host}:{port}" in allowed or (host in allowed and port == own):
        return
    what = f"host {host}" if port == own else f"{host}:{port}"
    raise refusal(shown, f"this server does not fetch images from {what} (--allow-remote-images)")


def public(address: str) -> bool:
    """True for an IP address of the public internet: not ours, not a neighbour's, not a cloud's own services."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is not None:
            return public(str(inner))
        if found.teredo is not None or found in NAT64:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


NAT64 = ipaddress.ip_network("64:ff9b::/96")


def refusal(shown: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Could not fetch image: {shown}: {reason}")


def hosts(settings: tuple[str, ...]) -> frozenset[str]:
    """The hosts of --allow-remote-images, each flag a list with commas."""
    return frozenset(host.strip().lower() for one in settings for host in one.split(",") if host.strip())
