# SPDX-License-Identifier: Apache-2.0
"""Where a request comes from, and whether its Host and Origin headers are acceptable. Pure.

Clients that need no key are admitted by their address alone, so pages of other sites in their browser must
not make use of that: the Host header must be this host's (against DNS rebinding), and the page's origin must
be this server or allowed. A request through a proxy counts as coming from the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Literal

from starlette.types import Scope

from gpuinfer.addresses import address, contains, origin, split_host, split_origin
from gpuinfer.errors import ForeignHost, ForeignOrigin
from gpuinfer.settings import ApiSettings

#: ``unix``, ``loopback``: this host. ``anonymous``: listed in ``api.anonymous``. ``network``: any other.
Arrival = Literal["unix", "loopback", "anonymous", "network"]

#: Headers by which proxies identify clients: with an address, and without one.
_NAMING = frozenset(
    (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip")
)
_FORWARDED = _NAMING | {b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-server", b"via"}
#: Maximum cached client addresses, and accepted Host headers.
_KNOWN = 1024
_DEFAULT_PORTS = {"http": 80, "https": 443}


def key_needed(*, keys: bool) -> str:
    """Return the message for a caller without a key; while there are no keys, how to make one."""
    if keys:
        return "this needs a key: Authorization: Bearer gpi_... or X-API-Key: gpi_..."
    return (
        "this needs a key, but there are none yet; on this host, as root: gpuinfer key add NAME; "
        "then: Authorization: Bearer gpi_..."
    )


class Network:
    """The rules for callers from the settings. ``this_host``: this host's name."""

    def __init__(self, api: ApiSettings, this_host: str) -> None:
        self._anonymous = tuple(map(ip_network, api.anonymous))
        self._names = frozenset((this_host.lower(), "localhost", *api.hosts)) - {""}
        self._origins = frozenset(api.cors_origins)
        self._known: dict[str, tuple[bool, bool]] = {}
        #: Accepted Host headers, cached.
        self._right: set[tuple[bytes, Arrival]] = set()

    def arrival(self, scope: Scope, *, keys: bool = True) -> Arrival:
        """Return where a request comes from. ``keys``: whether there are any keys.

        With keys, ``api.anonymous`` takes precedence over loopback, which needs a key then; without keys,
        loopback takes precedence. A proxy's header never gives more rights: every address in it must be in
        ``api.anonymous``, too.
        """
        client = scope.get("client")
        if client is None:
            server = scope.get("server")
            local = server is not None and server[1] is None
            return "unix" if local and not _is_forwarded(scope) else "network"
        loopback, anonymous = self._place(client[0])
        if not (loopback or anonymous):
            return "network"
        if loopback and not (keys and anonymous) and not _is_forwarded(scope):
            return "loopback"
        return "anonymous" if anonymous and self._all_anonymous(scope) else "network"

    def _place(self, text: str) -> tuple[bool, bool]:
        """Return (address is loopback, address is in ``api.anonymous``)."""
        known = self._known.get(text)
        if known is None:
            found = address(text)
            if len(self._known) >= _KNOWN:
                self._known.clear()
            known = (False, False)
            if found is not None:
                known = (found.is_loopback, contains(self._anonymous, found))
            self._known[text] = known
        return known

    def _all_anonymous(self, scope: Scope) -> bool:
        return all(self._place(text)[1] for text in _forwarded_for(scope))

    def check(self, scope: Scope, arrival: Arrival) -> None:
        """Raise ForeignOrigin for a page that is not allowed, ForeignHost if Host is not a name of this host.

        Host is checked only for requests without a key: pass "network" for those with one.
        """
        free = arrival in ("loopback", "anonymous")
        host, page = b"", None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
                if free and value and (value, arrival) not in self._right:
                    self._check_host(value, arrival)
            elif name == b"origin":
                page = value
        if page is not None:
            self._check_origin(page.decode("latin-1"), host.decode("latin-1"))

    def _check_origin(self, page: str, host: str) -> None:
        if not self.allows(page) and not _same(page, host):
            text = f"pages of {page[:200]!r} may not use this server; api.cors_origins lists those that may"
            raise ForeignOrigin(text, "Origin")

    def _check_host(self, value: bytes, arrival: Arrival) -> None:
        host = value.decode("latin-1")
        name, _ = split_host(host)
        found = address(name)
        right = found is not None and (found.is_loopback or arrival == "anonymous")
        if right or name in self._names:
            if len(self._right) >= _KNOWN:
                self._right.clear()
            self._right.add((value, arrival))
            return
        text = (
            f"{host[:200]!r} is not a name of this host; without a key, use its own name or one of api.hosts"
        )
        raise ForeignHost(text, "Host")

    def allows(self, page: str) -> bool:
        """Whether ``api.cors_origins`` allows a page's origin."""
        if not self._origins:
            return False
        return page in self._origins or "*" in self._origins or _usual(page) in self._origins


def _is_forwarded(scope: Scope) -> bool:
    return not _FORWARDED.isdisjoint([name for name, _ in scope["headers"]])


def _forwarded_for(scope: Scope) -> Iterator[str]:
    """Yield the clients that proxies named: addresses without ports, or any other text given instead."""
    for name, value in scope["headers"]:
        if name not in _NAMING:
            continue
        for part in value.decode("latin-1").split(","):
            if name != b"forwarded":
                yield _bare(part)
                continue
            for pair in part.split(";"):
                key, _, given = pair.strip().partition("=")
                if key.strip().lower() == "for":
                    yield _bare(given.strip().strip('"'))


def _bare(text: str) -> str:
    """Return an address without brackets and port: ``[::1]:80``, ``10.0.0.1:80``."""
    text = text.strip()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _same(page: str, host: str) -> bool:
    """Whether a page comes from this server. The scheme is ignored, as a proxy may terminate TLS."""
    found = split_origin(page)
    if found is None:
        return False
    scheme, name, port = found
    known = address(name)
    named, given = split_host(host)
    return named == (name if known is None else str(known)) and port == (given or _DEFAULT_PORTS[scheme])


def _usual(page: str) -> str:
    """Return an origin in the form of the settings; other text unchanged."""
    try:
        return origin(page)
    except ValueError:
        return page
