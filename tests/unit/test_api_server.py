# SPDX-License-Identifier: Apache-2.0
"""The sockets that the front listens on."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from gpuinfer.api.server import address, listen
from gpuinfer.errors import AddressUnavailable

pytestmark = pytest.mark.unit

BOTH = [
    (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
]


def has_ipv6() -> bool:
    """Tell whether this machine has ::1."""
    try:
        with socket.socket(socket.AF_INET6) as found:
            found.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_a_name_of_two_addresses_is_served_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /etc/hosts of Debian has localhost: ::1 and 127.0.0.1, on one port, whichever comes first."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: BOTH)
    with ExitStack() as stack:
        found = [stack.enter_context(one) for one in listen("localhost", 0)]
        ports = {one.getsockname()[1] for one in found}
        assert len(ports) == 1
        urls = {address(one).rpartition(":")[0] for one in found}
        assert urls == ({"http://127.0.0.1", "http://[::1]"} if has_ipv6() else {"http://127.0.0.1"})
        for one in found:
            with socket.socket(one.family) as caller:
                caller.connect(one.getsockname())
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_that_is_absent_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without IPv6 may still name ::1 in /etc/hosts; a name of none is refused."""
    absent = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [absent, BOTH[1]])
    (found,) = listen("localhost", 0)
    assert found.getsockname()[0] == "127.0.0.1"
    found.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [absent])
    with pytest.raises(AddressUnavailable, match="cannot listen on nowhere:0"):
        listen("nowhere", 0)


def test_a_port_that_is_taken_is_refused() -> None:
    """Whoever holds it keeps it."""
    (taken,) = listen("127.0.0.1", 0)
    with taken, pytest.raises(AddressUnavailable, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])
