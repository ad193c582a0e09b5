# SPDX-License-Identifier: Apache-2.0
"""``/metrics``: on the API, or on its own address (``metrics.listen``), which needs no key.

The latter is a minimal server: it reads a request's head and answers, without keys, TLS and the API's limits.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from gpuinfer.api import fleet_schemas, query
from gpuinfer.api.shared import header, shared
from gpuinfer.metrics.page import Page

router = APIRouter()
_NONE: frozenset[str] = frozenset()
#: Maximum bytes of a request's head, and seconds within which it must arrive.
_HEAD_BYTES, _HEAD_S = 16 * 1024, 5.0
_PLAIN = "text/plain; charset=utf-8"


@router.get(
    "/metrics", tags=["fleet"], summary="Metrics for Prometheus", responses=fleet_schemas.METRICS_RESPONSES
)
async def metrics(request: Request) -> Response:
    """This host's metrics in Prometheus's format; on Redis's host also those of the whole fleet. 404 if
    `metrics.listen` is set: the metrics are at that address then."""
    query.parse(request.scope, _NONE)
    ours = shared(request.scope)
    if ours.settings.metrics.listen:
        raise HTTPException(404, "metrics are served on another address, because metrics.listen is set")
    body, content_type = await ours.metrics.answer(header(request.scope, b"accept"))
    return Response(body, headers={"content-type": content_type})


@asynccontextmanager
async def serving(listeners: Sequence[socket.socket], page: Page) -> AsyncIterator[None]:
    """Serve metrics on these sockets, which stay open for other processes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(await _answer(head, page))
            async with asyncio.timeout(_HEAD_S):
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # too slow or too long for a monitoring system: close
        finally:
            writer.close()

    async with AsyncExitStack() as servers:
        for listener in listeners:
            start: Any = (
                asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
            )
            server = await start(answer, sock=listener.dup(), limit=_HEAD_BYTES)
            servers.push_async_callback(_stop, server)
        yield


async def _stop(server: asyncio.Server) -> None:
    server.close()


async def _answer(head: bytes, page: Page) -> bytes:
    """Return the complete answer to a request with this head."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    fields = {name.strip().lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
    if path not in ("/metrics", "/"):
        return _response("404 Not Found", b"metrics are at /metrics\n", _PLAIN)
    if method not in ("GET", "HEAD"):
        return _response(
            "405 Method Not Allowed", b"/metrics supports only GET\n", _PLAIN, "allow: GET, HEAD\r\n"
        )
    body, content_type = await page.answer(fields.get("accept", ""))
    return _response("200 OK", body, content_type, empty=method == "HEAD")


def _response(status: str, body: bytes, content_type: str, more: str = "", *, empty: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        f"{more}connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (b"" if empty else body)
