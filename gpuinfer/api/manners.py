# SPDX-License-Identifier: Apache-2.0
"""General HTTP behaviour: HEAD and OPTIONS for every GET route, and trailing slashes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: For these paths OPTIONS has the status of GET, as some load balancers probe that way.
_HEALTH = "/health/"

#: Scope key of the answer to OPTIONS.
_ALLOW = "gpuinfer.allow"
#: Path -> its methods.
Methods = Callable[[str], frozenset[str]]


class Manners:
    """Pure ASGI: the inner application gets GET, POST, PUT, DELETE and OPTIONS, and no trailing slash.

    For OPTIONS it calls ``methods_told`` once the caller is admitted.
    """

    def __init__(self, app: ASGIApp, methods: Methods) -> None:
        self._app = app
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        # An encoded slash is part of a task id: /result/cam1%2F
        if path.endswith("/") and len(path) > 1 and scope.get("raw_path", b"/").endswith(b"/"):
            path = path.removesuffix("/")
            scope = {**scope, "path": path, "raw_path": scope.get("raw_path", b"")[:-1]}
        if method == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _Headless(send))
        elif method == "OPTIONS" and (found := self._methods(path)):
            allow = b", ".join(sorted(one.encode() for one in found | {"OPTIONS"}))
            if path.startswith(_HEALTH):
                await self._app({**scope, "method": "GET"}, receive, _Headless(send, allow))
                return
            await self._app({**scope, _ALLOW: allow}, receive, send)
        else:
            await self._app(scope, receive, send)


async def methods_told(scope: Scope, send: Send) -> bool:
    """Answer OPTIONS with the path's methods; False if it is another method or an unknown path."""
    allow: bytes | None = scope.get(_ALLOW)
    if allow is None:
        return False
    headers = [(b"allow", allow), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
    return True


class _Headless:
    """Sends an answer without its body, but with its Content-Length."""

    def __init__(self, send: Send, allow: bytes = b"") -> None:
        self._send = send
        self._allow = allow

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._allow:
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"content-length"]
            headers += [(b"allow", self._allow), (b"content-length", b"0")]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)


def methods_of(documented: Mapping[str, Iterable[str]], others: Iterable[str] = ()) -> Methods:
    """Return a lookup of a path's methods. ``documented``: OpenAPI path -> methods.

    ``others``: paths with GET. If several match, the one with the longest fixed part wins: /tasks/{id}/result
    before /tasks/{id}.
    """
    found = {path: frozenset(one.upper() for one in methods) for path, methods in documented.items()}
    found |= {path: frozenset({"GET"}) for path in others}
    patterns = [
        (re.compile(_PARAMETER.sub(".+", re.sub(r"([.+*?])", r"\\\1", path))), methods)
        for path, methods in sorted(found.items(), key=lambda item: -len(_PARAMETER.sub("", item[0])))
    ]

    def methods(path: str) -> frozenset[str]:
        for pattern, its in patterns:
            if pattern.fullmatch(path):
                return its | {"HEAD"} if "GET" in its else its
        return frozenset()

    return methods


_PARAMETER = re.compile(r"\{[^}]*\}")
