# SPDX-License-Identifier: Apache-2.0
"""Who is let in, by role, by what is asked and by how the request came: the whole front on a real Redis."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gpuinfer.api.front import Front
from gpuinfer.keys.key import Key, digest, serialise
from gpuinfer.settings import Settings
from tests.services import RedisServer

pytestmark = pytest.mark.integration

#: How a request comes -> its client and server addresses as uvicorn has them.
TRANSPORTS: Mapping[str, tuple[tuple[str, int] | None, tuple[str, int | None]]] = {
    "unix": (None, ("/run/gpuinfer/api.sock", None)),
    "loopback": (("127.0.0.1", 50000), ("127.0.0.1", 8080)),
    "anonymous": (("10.1.2.3", 50000), ("10.0.0.1", 8080)),
    "network": (("192.0.2.7", 50000), ("192.0.2.1", 8080)),
}
#: What a request shows -> its token.
TOKENS = {"predict": "gpi_predict", "read": "gpi_read", "admin": "gpi_admin"}
DIGIT = {"inputs": [1], "model": "digits"}


class Site:
    """The whole front in this process, on a real Redis, with a folder of keys; ask it by any transport."""

    def __init__(self, front: Front, folder: Path) -> None:
        self.front = front
        self.folder = folder

    def put(self, name: str, token: str, **fields: Any) -> None:
        """Write a key, as it counts after the next look, which is now."""
        (self.folder / f"{name}.toml").write_text(serialise(Key(name=name, sha256=digest(token), **fields)))
        self.front.shared.keys.look()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        by: str = "network",
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
    ) -> httpx.Response:
        """Send one request."""
        client, server = TRANSPORTS[by]

        async def arrived(scope: Scope, receive: Receive, send: Send) -> None:
            await self.front({**scope, "client": client, "server": server}, receive, send)

        given = dict(headers or {}) | ({"authorization": f"Bearer {token}"} if token else {})
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(arrived), base_url="http://localhost"
        ) as http:
            return await http.request(method, path, headers=given, json=json)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Site]:
    """A front that serves."""
    front = Front(settings)
    async with front._app.router.lifespan_context(front._app):
        yield Site(front, settings.api.keys_dir)


@pytest.fixture
def keyed(redis_server: RedisServer, settings_for: Callable[..., Settings], tmp_path: Path) -> Settings:
    """Settings with an empty folder of keys."""
    folder = tmp_path / "keys.d"
    folder.mkdir()
    found = settings_for(redis_server)
    update = {"keys_dir": folder, "anonymous": ("10.0.0.0/8",)}
    return found.model_copy(update={"api": found.api.model_copy(update=update)})


#: Verb -> a request of it, and its status where it is let in.
REQUESTS: Mapping[str, tuple[str, str, Any, int]] = {
    "health": ("GET", "/health/live", None, 200),
    "look": ("GET", "/queues", None, 200),
    "docs": ("GET", "/openapi.json", None, 200),
    "options": ("OPTIONS", "/predict", None, 200),
    "oip": ("GET", "/v2", None, 200),
    "submit": ("POST", "/predict", DIGIT, 202),
    "change": ("POST", "/tasks/nobody/cancel", None, 404),
    "manage": ("POST", "/v2/repository/models/nosuch/unload", None, 404),
}
#: Who -> the verbs that are let in, beside health; the rest of them is a 403.
MAY = {
    "read": {"look", "docs", "options", "oip"},
    "predict": {"look", "docs", "options", "oip", "submit", "change"},
    "admin": set(REQUESTS),
}


def expected(who: str, by: str, verb: str, *, keys: bool) -> int:
    """Return the status of a request, as the issue has it: written apart from the code that decides."""
    if verb == "health":
        return REQUESTS[verb][3]
    role: str | None = who if who in MAY else None
    if who == "bogus":
        role = None
    elif role is None and by == "anonymous":
        role = "predict"
    elif role is None and (by == "unix" or (by == "loopback" and not keys)):
        role = "admin"
    if role is None:
        return 401
    return REQUESTS[verb][3] if verb in MAY[role] else 403


async def test_the_matrix(keyed: Settings) -> None:
    """Role x verb x transport, with keys in use and without any; expired and unknown tokens."""
    async with opened(keyed) as site:
        wrong = []
        for keys in (False, True):
            if keys:
                for role, its_token in TOKENS.items():
                    site.put(role, its_token, role=role)
                site.put("old", "gpi_old", role="admin", expires=1.0)
            whos = ("none", "bogus", *(TOKENS if keys else ()), *(("old",) if keys else ()))
            for who, by, verb in itertools.product(whos, TRANSPORTS, REQUESTS):
                method, path, body, _ = REQUESTS[verb]
                token: str | None = None if who == "none" else f"gpi_{who}"
                answer = await site.ask(method, path, by=by, token=token, json=body)
                wanted = expected("bogus" if who == "old" else who, by, verb, keys=keys)
                if answer.status_code != wanted:
                    wrong.append((keys, who, by, verb, answer.status_code, wanted, answer.text))
        assert wrong == []


async def test_what_a_refusal_says(keyed: Settings) -> None:
    """How a key is made while there is none; the challenge of RFC 6750; the protocol's own form of errors."""
    async with opened(keyed) as site:
        first = await site.ask("GET", "/queues")
        assert first.json()["error"]["code"] == "unauthorized"
        assert "gpuinfer key add NAME" in first.json()["error"]["message"]
        assert first.headers["www-authenticate"] == 'Bearer realm="gpuinfer"'
        site.put("shop", "gpi_x", role="read")
        site.put("old", "gpi_old", expires=1.0)
        none = await site.ask("GET", "/queues", by="loopback")
        assert "gpuinfer key add" not in none.json()["error"]["message"]
        unknown = await site.ask("GET", "/queues", token="gpi_y")
        assert unknown.json()["error"]["message"] == "this key is unknown, or was revoked"
        assert unknown.headers["www-authenticate"] == 'Bearer realm="gpuinfer", error="invalid_token"'
        old = await site.ask("GET", "/queues", token="gpi_old")
        assert old.json()["error"]["message"] == "this key has expired"
        role = await site.ask("POST", "/predict", token="gpi_x", json=DIGIT)
        assert role.json()["error"] == {
            "code": "forbidden",
            "message": "POST /predict needs a key with the role predict or admin, "
            "and the key shop has the role read",
        }
        protocol = await site.ask("GET", "/v2")
        assert protocol.status_code == 401
        assert protocol.json() == {"error": protocol.json()["error"]}
        assert protocol.headers["www-authenticate"] == 'Bearer realm="gpuinfer"'


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "bearer gpi_x"}, 200),
        ({"authorization": "BEARER   gpi_x "}, 200),
        ({"x-api-key": "gpi_x"}, 200),
        ({"X-API-Key": " gpi_x "}, 200),
        ({"authorization": "Basic Zzp4", "x-api-key": "gpi_x"}, 200),
        ({"authorization": "Bearer gpi_x", "x-api-key": "gpi_y"}, 200),
        ({"authorization": "Bearer gpi_y", "x-api-key": "gpi_x"}, 401),
        ({"authorization": "Basic Zzp4"}, 401),
        ({"authorization": "gpi_x"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer gpi_X"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "gpi_x\xff"}, 401),
    ],
)
async def test_how_a_key_is_shown(keyed: Settings, headers: dict[str, str], status: int) -> None:
    """As a bearer token, or as X-API-Key; the first of them where both are there."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_x")
        encoded: Any = {name: value.encode("latin-1") for name, value in headers.items()}
        assert (await site.ask("GET", "/queues", headers=encoded)).status_code == status


async def test_health_tells_nobody_more_than_how_it_is(keyed: Settings) -> None:
    """Neither why, nor which models there are; who has a key is told."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_x", role="read")
        for path in ("/health/ready", "/health/ready?model=nosuch", "/v2/health/ready"):
            bare = await site.ask("GET", path)
            assert bare.status_code == 503
            assert "no live worker serves, and none may be started" in bare.text
        known = await site.ask("GET", "/health/ready", token="gpi_x")
        assert "run gpuinfer doctor" in known.text


async def test_without_redis_nothing_of_the_host_is_told(keyed: Settings, redis_server: RedisServer) -> None:
    """Where Redis is says the log, and the administrator's answer."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_x")
        site.put("boss", "gpi_b", role="admin")
        redis_server.stop()
        told = await site.ask("GET", "/queues", token="gpi_x")
        assert (told.status_code, told.json()["error"]["message"]) == (
            503,
            "the queue cannot be used now; the log of this server says why",
        )
        admin = await site.ask("GET", "/queues", token="gpi_b")
        assert admin.json()["error"]["message"] != told.json()["error"]["message"]
