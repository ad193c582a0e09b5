# SPDX-License-Identifier: Apache-2.0
"""HEAD and OPTIONS where GET is, and closing slashes."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gpuinfer.api.manners import Manners, methods_of, methods_told

pytestmark = pytest.mark.unit

METHODS = methods_of(
    {
        "/predict": ["post"],
        "/result/{task_id}": ["get"],
        "/tasks/{id}": ["get", "put"],
        "/health/ready": ["get"],
    },
    ["/docs"],
)


async def _inner(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with method and path."""
    if await methods_told(scope, send):
        return
    body = f"{scope['method']} {scope['path']}".encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 203, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def ask(method: str, path: str, raw: str | None = None) -> tuple[int, dict[bytes, bytes], bytes]:
    """Return status, headers and body."""
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    scope = {"type": "http", "method": method, "path": path, "raw_path": (raw or path).encode()}
    await Manners(_inner, METHODS)(scope, receive, send)
    return told[0]["status"], dict(told[0]["headers"]), told[1]["body"]


async def test_head_is_get_without_the_body() -> None:
    """Status and length are those of GET."""
    assert await ask("HEAD", "/result/x") == (203, {b"content-length": b"13"}, b"")


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/predict", b"OPTIONS, POST"),
        ("/result/cam1/frame", b"GET, HEAD, OPTIONS"),
        ("/tasks/x/", b"GET, HEAD, OPTIONS, PUT"),
        ("/docs", b"GET, HEAD, OPTIONS"),
    ],
)
async def test_options_names_the_methods(path: str, allow: bytes) -> None:
    """200 with Allow and no body."""
    assert await ask("OPTIONS", path) == (200, {b"allow": allow, b"content-length": b"0"}, b"")


async def test_options_of_health_tells_health() -> None:
    """HAProxy's httpchk asks so: the status is that of GET."""
    status, headers, body = await ask("OPTIONS", "/health/ready")
    assert (status, headers[b"allow"], body) == (203, b"GET, HEAD, OPTIONS", b"")


async def test_options_of_nothing() -> None:
    """An unknown path is the router's to refuse."""
    assert (await ask("OPTIONS", "/nowhere"))[2] == b"OPTIONS /nowhere"


async def test_a_closing_slash_is_served() -> None:
    """It is taken off, unless it is encoded, and so a part of an id."""
    assert (await ask("GET", "/predict/"))[2] == b"GET /predict"
    assert (await ask("GET", "/"))[2] == b"GET /"
    assert (await ask("GET", "/result/x/", "/result/x%2F"))[2] == b"GET /result/x/"
