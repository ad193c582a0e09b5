# SPDX-License-Identifier: Apache-2.0
"""Networks, web origins and host names, as settings and requests have them. Pure; nothing is looked up."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Net = IPv4Network | IPv6Network

#: IPv4-mapped IPv6 addresses: ::ffff:10.0.0.1 is 10.0.0.1.
_MAPPED = IPv6Network("::ffff:0:0/96")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")


def address(text: str) -> Address | None:
    """Return an IP address; None for what is none.

    A zone (``%eth0``) is dropped; an IPv4-mapped one is IPv4.
    """
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def network(text: str) -> str:
    """Return a network in its usual form (``10.0.0.0/8``). Raises ValueError saying what would be right."""
    try:
        found = ip_network(text.strip())
    except ValueError:
        raise ValueError(_not_a_network(text)) from None
    if isinstance(found, IPv6Network) and found.subnet_of(_MAPPED):
        start = found.network_address.ipv4_mapped
        return f"{start}/{found.prefixlen - 96}"
    return str(found)


def _not_a_network(text: str) -> str:
    words = "must be networks such as 10.0.0.0/8 or fd00::/8"
    try:
        return f"{words}; {text} has bits beyond its length, its network is {ip_network(text, strict=False)}"
    except ValueError:
        return f"{words}, not {text!r}"


def contains(networks: tuple[Net, ...], found: Address) -> bool:
    """Tell whether an address is in one of the networks."""
    return any(found.version == one.version and found in one for one in networks)


def origin(text: str) -> str:
    """Return a web origin as browsers send it: ``https://app.example``, and a port that is not the usual one.

    ``*`` is itself. Raises ValueError saying what would be right.
    """
    if text == "*":
        return text
    found = split_origin(text.rstrip("/"))
    if found is None:
        raise ValueError(f"must be origins such as https://app.example or http://10.0.0.5:3000, not {text!r}")
    scheme, host, port = found
    return f"{scheme}://{_in_url(host)}" + ("" if port == _DEFAULT_PORTS[scheme] else f":{port}")


def split_origin(text: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of an http or https origin; None for another text, ``null`` among them."""
    try:
        found = urlsplit(text)
        port = found.port
    except ValueError:
        return None
    default = _DEFAULT_PORTS.get(found.scheme)
    rest = found.path or found.query or found.fragment or "@" in found.netloc
    if default is None or rest or not found.hostname:
        return None
    return found.scheme, found.hostname, default if port is None else port


def host_name(text: str) -> str:
    """Return a host's name or address in lower case. Raises ValueError saying what would be right."""
    name = text.strip().lower().rstrip(".")
    found = address(name.removeprefix("[").removesuffix("]"))
    if found is not None:
        return str(found)
    if not _NAME.fullmatch(name):
        raise ValueError(f"must be host names without a port, such as gpu1.example.org, not {text!r}")
    return name


def split_host(text: str) -> tuple[str, int | None]:
    """Return name and port of a Host header: the name in lower case, an address without brackets.

    The name is empty where the text is no host at all.
    """
    try:
        found = urlsplit(f"//{text.strip()}")
        name, port = found.hostname or "", found.port
    except ValueError:
        return "", None
    if found.path or found.query or found.fragment or "@" in found.netloc:
        return "", None
    known = address(name)
    return (name.rstrip(".") if known is None else str(known)), port


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
