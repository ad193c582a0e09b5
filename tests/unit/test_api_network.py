# SPDX-License-Identifier: Apache-2.0
"""Where a request comes from, whose Host and Origin are believed, and what a browser is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gpuinfer.api.cors import Cors
from gpuinfer.api.front import Front
from gpuinfer.api.network import Arrival, Network, key_needed
from gpuinfer.errors import ForeignHost, ForeignOrigin
from gpuinfer.settings import ApiSettings, Settings

pytestmark = pytest.mark.unit

Headers = dict[str, str]


def network(**settings: object) -> Network:
    return Network(ApiSettings.model_validate(settings), "gpu1")


def scope(client: str | None, headers: Headers | None = None, *, server: object = ("10.0.0.2", 8080)) -> Any:
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    client_pair = None if client is None else (client, 50000)
    return {"type": "http", "method": "GET", "client": client_pair, "server": server, "headers": pairs}


SOCKET = ("/run/gpuinfer/api.sock", None)
OPEN = ("10.0.0.0/8", "fd00::/8", "fe80::/10")


@pytest.mark.parametrize(
    ("client", "arrival"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.0.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.1.2.3", "anonymous"),
        ("::ffff:10.1.2.3", "anonymous"),
        ("fd12::7", "anonymous"),
        ("fe80::1%eth0", "anonymous"),
        ("11.0.0.1", "network"),
        ("2001:db8::1", "network"),
        ("::ffff:11.0.0.1", "network"),
        ("::7f00:1", "network"),  # IPv4-compatible, long given up: no loopback
        ("testclient", "network"),
        ("", "network"),
    ],
)
def test_arrival_by_address(client: str, arrival: str) -> None:
    """Loopback in all its forms, and the networks of api.anonymous; what is unknown is the network."""
    found = network(anonymous=OPEN)
    for _ in range(2):  # the second time from memory
        assert found.arrival(scope(client)) == arrival


def test_arrival_by_unix_socket() -> None:
    """A Unix socket has no address of the caller and no port of ours; a TCP peer that has left is no such."""
    assert network().arrival(scope(None, server=SOCKET)) == "unix"
    assert network().arrival(scope(None)) == "network"
    assert network().arrival(scope(None, server=None)) == "network"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-For", "203.0.113.7"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Real-IP", "127.0.0.1"),
        ("Forwarded", "for=127.0.0.1"),
        ("Forwarded", ""),
        ("X-Forwarded-Proto", "https"),
        ("Via", "1.1 proxy"),
    ],
)
def test_a_proxy_on_this_host_is_the_network(name: str, value: str) -> None:
    """Whom it asks for is not here, whatever the header says, and whichever socket it uses."""
    for client, server in (("127.0.0.1", ("127.0.0.1", 8080)), (None, SOCKET)):
        for keys in (False, True):
            found = network().arrival(scope(client, {name: value}, server=server), keys=keys)
            assert found == "network"


@pytest.mark.parametrize(
    ("name", "value", "arrival"),
    [
        ("X-Forwarded-For", "10.9.9.9", "anonymous"),
        ("X-Forwarded-For", "10.9.9.9, 10.0.0.4:5555", "anonymous"),
        ("X-Forwarded-For", "10.9.9.9, 203.0.113.7", "network"),
        ("X-Forwarded-For", "203.0.113.7, 10.0.0.4", "network"),
        ("X-Forwarded-For", "unknown", "network"),
        ("X-Real-IP", "203.0.113.7", "network"),
        ("Forwarded", 'for=10.0.0.4;proto=https, For="[fd00::9]:4711"', "anonymous"),
        ("Forwarded", 'for=10.0.0.4, for="[2001:db8::9]"', "network"),
        ("Forwarded", "for=_hidden", "network"),
        ("Via", "1.1 proxy", "anonymous"),
    ],
)
def test_a_proxy_in_an_anonymous_network_lends_nobody_its_place(name: str, value: str, arrival: str) -> None:
    """Everybody whom its headers name must be in api.anonymous."""
    assert network(anonymous=OPEN).arrival(scope("10.0.0.3", {name: value})) == arrival


def test_loopback_in_an_anonymous_network() -> None:
    """Without any key it stays this host itself; with one, it needs none to predict."""
    found = network(anonymous=["127.0.0.0/8"])
    assert found.arrival(scope("127.0.0.1"), keys=False) == "loopback"
    assert found.arrival(scope("127.0.0.1"), keys=True) == "anonymous"
    assert network().arrival(scope("127.0.0.1"), keys=True) == "loopback"


@pytest.mark.parametrize(
    ("host", "arrival"),
    [
        ("localhost", "loopback"),
        ("LOCALHOST:8080", "loopback"),
        ("localhost.", "loopback"),
        ("127.0.0.1:8080", "loopback"),
        ("[::1]:8080", "loopback"),
        ("gpu1:8080", "loopback"),
        ("gpu1.example.org", "loopback"),
        ("10.0.0.2:8080", "anonymous"),
        ("[fd00::2]", "anonymous"),
        ("", "loopback"),
        ("evil.example", "network"),  # with a key
        ("evil.example", "unix"),
    ],
)
def test_own_names(host: str, arrival: Any) -> None:
    """This host under its names, an address, and any name for who shows a key or uses the Unix socket."""
    network(hosts=["gpu1.example.org"]).check(scope("127.0.0.1", {"Host": host}), arrival)


@pytest.mark.parametrize(
    ("host", "arrival"),
    [
        ("evil.example:8080", "loopback"),
        ("localhost.evil.example", "loopback"),
        ("gpu1.evil.example", "loopback"),
        ("127.0.0.1.evil.example", "loopback"),
        ("localhost@evil.example", "loopback"),
        ("10.0.0.2", "loopback"),
        ("evil.example", "anonymous"),
        ("localhost:port", "loopback"),
        ("[::1", "loopback"),
    ],
)
def test_other_names_are_refused(host: str, arrival: Any) -> None:
    """A page of evil.example whose name means 127.0.0.1 for a moment gets nothing."""
    with pytest.raises(ForeignHost, match=r"api\.hosts"):
        network().check(scope("127.0.0.1", {"Host": host}), arrival)


def test_each_of_two_host_headers_counts() -> None:
    """What another parser would take must be right, too."""
    twice = scope("127.0.0.1", {"Host": "evil.example"})
    twice["headers"].append((b"host", b"localhost"))
    with pytest.raises(ForeignHost):
        network().check(twice, "loopback")


@pytest.mark.parametrize(
    ("page", "host"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://[::1]:8080", "[::1]:8080"),
        ("https://ml.example", "ml.example"),  # a proxy ended the TLS
        ("http://ml.example", "ml.example:80"),
        ("https://app.example", "ml.example"),
        ("https://app.example:443", "ml.example"),
        ("http://10.0.0.5:3000", "ml.example"),
    ],
)
def test_origins_that_may_ask(page: str, host: str) -> None:
    """Its own pages, /docs among them, and those of api.cors_origins."""
    found = network(cors_origins=["https://app.example/", "http://10.0.0.5:3000"])
    found.check(scope("192.0.2.1", {"Host": host, "Origin": page}), "network")


@pytest.mark.parametrize(
    "page",
    [
        "https://evil.example",
        "null",
        "http://localhost:9999",
        "https://app.example:444",
        "http://app.example",
    ],
)
def test_foreign_origins_are_refused(page: str) -> None:
    """Also by the Unix socket, also with a key: no page of somebody else's is served."""
    found = network(cors_origins=["https://app.example"])
    arrivals: tuple[Arrival, ...] = ("loopback", "network", "unix")
    for arrival in arrivals:
        with pytest.raises(ForeignOrigin, match=r"api\.cors_origins"):
            found.check(scope("127.0.0.1", {"Host": "localhost:8080", "Origin": page}), arrival)


def test_all_origins() -> None:
    """An asterisk is all of them."""
    network(cors_origins=["*"]).check(scope("192.0.2.1", {"Origin": "https://evil.example"}), "network")


def test_how_a_key_is_made_is_told_while_there_is_none() -> None:
    """The very command; with keys, how one is shown."""
    assert "gpuinfer key add NAME" in key_needed(keys=False)
    assert "gpuinfer key add" not in key_needed(keys=True)


def answer(found: Network, method: str, headers: Headers) -> tuple[int, Headers]:
    """Return status and headers of what Cors sends, around an application that answers 200."""
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {**scope("192.0.2.1", headers), "method": method}
    asyncio.run(Cors(application, found)(asked, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], {key.decode(): value.decode() for key, value in sent[0]["headers"]}


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
    "Access-Control-Request-Private-Network": "true",
}


def test_a_browser_is_told_what_a_page_may() -> None:
    """The question comes without a key, and is answered all the same; nothing is said to others' pages."""
    found = network(cors_origins=["https://app.example"])
    status, headers = answer(found, "OPTIONS", PREFLIGHT)
    assert status == 204
    assert headers["access-control-allow-origin"] == "https://app.example"
    assert headers["access-control-allow-headers"] == "authorization,content-type"
    assert "PUT" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-private-network"] == "true"
    status, headers = answer(found, "OPTIONS", {**PREFLIGHT, "Origin": "https://evil.example"})
    assert status == 200
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_page_may_read_its_answer() -> None:
    """With the headers that tell it when to come back; who has no origin gets none of it."""
    found = network(cors_origins=["https://app.example"])
    status, headers = answer(found, "GET", {"Origin": "https://app.example"})
    assert status == 200
    assert headers["access-control-allow-origin"] == "https://app.example"
    assert "retry-after" in headers["access-control-expose-headers"]
    assert headers["vary"] == "Origin"
    assert "vary" not in answer(found, "GET", {})[1]
    assert answer(found, "OPTIONS", {"Origin": "https://app.example"})[0] == 200


def test_the_front_answers_browsers_before_it_asks_for_a_key(tmp_path: Path) -> None:
    """And lets a page read why it is refused."""
    api = {"cors_origins": ["https://app.example"], "keys_dir": tmp_path}
    front = Front(Settings.model_validate({"api": api}))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    for method, path, headers in (
        ("OPTIONS", "/predict", PREFLIGHT),
        ("GET", "/queues", {"Origin": "https://app.example"}),
        ("GET", "/queues", {"Origin": "https://evil.example"}),
    ):
        asked = {**scope("192.0.2.1", headers), "method": method, "path": path, "raw_path": path.encode()}
        asyncio.run(front({**asked, "query_string": b""}, None, send))  # type: ignore[arg-type]
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert [message["status"] for message in starts] == [204, 401, 403]
    readable = [b"access-control-allow-origin" in dict(message["headers"]) for message in starts]
    assert readable == [True, True, False]


async def test_who_does_not_read_what_health_is_takes_nobodys_place(tmp_path: Path) -> None:
    """Without a key: else such connections could use up api.max_requests."""
    front = Front(Settings.model_validate({"api": {"keys_dir": tmp_path}}))
    path = "/health/live"
    asked = {**scope("192.0.2.1", {}), "method": "GET", "path": path, "raw_path": path.encode()}
    stuck, read = asyncio.Event(), asyncio.Event()
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])
        stuck.set()
        await read.wait()

    task = asyncio.create_task(front({**asked, "query_string": b""}, None, send))  # type: ignore[arg-type]
    await asyncio.wait_for(stuck.wait(), 60)
    assert front.shared.requests_now == 0
    read.set()
    await task
    assert statuses == [200]
