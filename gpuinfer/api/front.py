# SPDX-License-Identifier: Apache-2.0
"""The outermost application: fast routes as plain ASGI, FastAPI for everything else.

FastAPI also documents the fast routes, and answers methods that they do not support.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from gpuinfer.api import access, submission
from gpuinfer.api.app import create_app, methods
from gpuinfer.api.cors import Cors
from gpuinfer.api.manners import Manners, methods_told
from gpuinfer.api.middleware import Around
from gpuinfer.api.oip import errors as oip_errors
from gpuinfer.api.oip import routes
from gpuinfer.api.reply import answered, send_error
from gpuinfer.api.shared import Requests, Shared
from gpuinfer.errors import FrontBusy, GpuinferError
from gpuinfer.log import get_logger
from gpuinfer.settings import Settings

log = get_logger(__name__)

Route = Callable[[Scope, Receive, Send], Awaitable[None]]
#: A route that takes the variable parts of its path.
RouteOf = Callable[..., Awaitable[None]]

#: Fast routes by method and path.
ROUTES: dict[tuple[str, str], Route] = {
    ("POST", "/predict"): submission.predict,
    ("POST", "/batch_predict"): submission.batch_predict,
}
#: Fast routes by method and path pattern; the groups are passed to the route.
PATTERNS: tuple[tuple[str, re.Pattern[str], RouteOf], ...] = (
    ("POST", re.compile(r"/models/([^/]+)/predict"), submission.predict_with),
    # curl -T cat.jpg sends PUT
    ("PUT", re.compile(r"/models/([^/]+)/predict"), submission.predict_with),
    ("PUT", re.compile(r"/tasks/([^/]+)"), submission.put_task),
    ("GET", re.compile(r"/result/(.+)", re.DOTALL), submission.result),
)


class Front:
    """The application that the server runs."""

    def __init__(
        self,
        settings: Settings,
        requests: Requests | None = None,
        metrics: Sequence[socket.socket] = (),
    ) -> None:
        """``metrics``: listening sockets of metrics.listen."""
        self.shared = Shared(settings, requests, metrics)
        self._app: FastAPI = create_app(self.shared)
        self._most = settings.api.max_requests
        around = Around(self._route, self.shared.stopping, self.shared.requests, self.shared.accounts)
        self._outermost: ASGIApp = Manners(around, methods(self._app))
        #: Serves the paths of ROUTES, which do not need ``manners``.
        self._fast: ASGIApp = around
        if settings.api.cors_origins:
            self._outermost = self._fast = Cors(self._outermost, self.shared.network)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.shared.enter(scope)
        app = self._fast if (scope["method"], scope["path"]) in ROUTES else self._outermost
        await app(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless too many requests are in progress. Health always answers."""
        shared = self.shared
        try:
            who = access.admit(scope)
        except GpuinferError as exc:
            await (oip_errors.send_error if _is_oip(scope["path"]) else send_error)(scope, send, exc)
            return
        # Without a key only health is served: slow readers of it must not use up the limit.
        counts = who is not access.NOBODY
        if counts and shared.requests_now >= self._most and not scope["path"].startswith("/health/"):
            busy = f"too many requests are in progress; api.max_requests is {self._most}"
            await send_error(scope, send, FrontBusy(busy))
            return
        shared.requests_now += counts
        try:
            await self._answer(scope, receive, send)
        finally:
            shared.requests_now -= counts
            shared.receiver.release(scope)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method == "OPTIONS" and await methods_told(scope, send):
            return
        found: tuple[str, ...] = ()
        route: RouteOf | None = ROUTES.get((method, path))
        if route is None:
            route, found = _by_pattern(method, path)
        if route is None:
            await (routes.serve if _is_oip(path) else self._app)(scope, receive, send)
            return
        await answered(scope, send, route(scope, receive, send, *found))


def _is_oip(path: str) -> bool:
    """Whether a path belongs to the Open Inference Protocol, which has its own error format."""
    return path.startswith(routes.PREFIX) and path[len(routes.PREFIX) :][:1] in ("", "/")


def _by_pattern(method: str, path: str) -> tuple[RouteOf | None, tuple[str, ...]]:
    for verb, pattern, route in PATTERNS:
        if verb == method and (found := pattern.fullmatch(path)):
            return route, found.groups()
    return None, ()
