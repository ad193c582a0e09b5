# SPDX-License-Identifier: Apache-2.0
"""What HTTP promises of every resource: HEAD and OPTIONS where GET is; and a closing slash is served."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Of these, OPTIONS has the status of GET: that is how some load balancers ask.
_HEALTH = "/health/"

#: Where a scope has the answer to OPTIONS.
_ALLOW = "gpuinfer.allow"
#: Path -> the methods that it has.
Methods = Callable[[str], frozenset[str]]


class Manners:
    """Pure ASGI: what is inside sees GET, POST, PUT and DELETE, and no closing slash; and OPTIONS, to which
    ``methods_told`` is the answer for who may ask."""

    def __init__(self, app: ASGIApp, methods: Methods) -> None:
        self._app = app
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        # Encoded, it is a part of a task's id: /result/cam1%2F
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
    """Answer a question for a path's methods; False: the request is none, or the path is not known."""
    allow: bytes | None = scope.get(_ALLOW)
    if allow is None:
        return False
    headers = [(b"allow", allow), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
    return True


class _Headless:
    """Sends an answer without its body, with the length that it would have."""

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
    """Return what tells a path's methods. ``documented``: path as OpenAPI has it -> methods.

    ``others`` have GET. Where several fit, the one with the longest fixed part counts: /tasks/{id}/result
    comes before /tasks/{id}.
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
