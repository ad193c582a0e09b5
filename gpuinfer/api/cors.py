# SPDX-License-Identifier: Apache-2.0
"""Cross-origin requests of web pages (CORS, https://fetch.spec.whatwg.org/), for ``api.cors_origins``.

A browser first sends a preflight (OPTIONS, without a key). It is answered before anything else is checked.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpuinfer.api.network import Network

#: Seconds for which a browser caches a preflight.
MAX_AGE_S = 600
_METHODS = b"GET, HEAD, POST, PUT, DELETE"
#: Response headers that a page may read, in addition to the standard ones.
_EXPOSED = (
    b"location, retry-after, ratelimit, ratelimit-policy, preference-applied, www-authenticate, "
    b"inference-header-content-length, traceparent"
)


class Cors:
    """Pure ASGI. Answers preflights, and lets allowed pages read answers.

    Preflights of other pages get no permission; their requests are refused by ``network``.
    """

    def __init__(self, app: ASGIApp, network: Network) -> None:
        self._app = app
        self._network = network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        page = headers.get(b"origin")
        if page is None or not self._network.allows(page.decode("latin-1")):
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await send({"type": "http.response.start", "status": 204, "headers": _permission(page, headers)})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._app(scope, receive, _Readable(send, page))


def _permission(page: bytes, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    found = [
        (b"access-control-allow-origin", page),
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", b"%d" % MAX_AGE_S),
        (b"vary", b"Origin, Access-Control-Request-Headers"),
    ]
    if asked := headers.get(b"access-control-request-headers"):
        found.append((b"access-control-allow-headers", asked))
    if b"access-control-request-private-network" in headers:
        found.append((b"access-control-allow-private-network", b"true"))
    return found


class _Readable:
    """Sends an answer with headers that let a page of this origin read it."""

    def __init__(self, send: Send, page: bytes) -> None:
        self._send = send
        self._page = page

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [
                (b"access-control-allow-origin", self._page),
                (b"access-control-expose-headers", _EXPOSED),
                (b"vary", b"Origin"),
            ]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)
