# SPDX-License-Identifier: Apache-2.0
"""The FastAPI application: one asyncio client for all requests, one format for all errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gpuinfer import __version__
from gpuinfer.api import documented, health, metrics, tasks
from gpuinfer.api.answers import answer
from gpuinfer.api.docs import PAGES, add_docs
from gpuinfer.api.drain import EVERY_S
from gpuinfer.api.manners import Methods, methods_of
from gpuinfer.api.middleware import note
from gpuinfer.api.oip import documented as oip_documented
from gpuinfer.api.reply import error_for
from gpuinfer.api.routes import router
from gpuinfer.api.shared import Shared
from gpuinfer.client import AsyncClient
from gpuinfer.errors import GpuinferError, InputError
from gpuinfer.keys.folder import CHECK_EVERY_S
from gpuinfer.log import get_logger

log = get_logger(__name__)

#: Seconds after which unchanged weights are sent to Redis again.
WEIGH_EVERY_S = 60.0

_DESCRIPTION = """Submit a task, then get its result. `POST /predict` answers 202 with a task id at once;
`GET /result/{task_id}?wait=10` answers as soon as the task has ended.
Every error has the body `{"error": {"code", "message", "field"?}}`."""
_CLIENT_CLOSED = 499  # nginx's number, for the log: the client is gone
#: Starlette's message for an unknown route or method -> ours.
_UNROUTED = {
    "Not Found": "there is no such route; see /docs",
    "Method Not Allowed": "this route does not support that method; see /docs",
}


def create_app(shared: Shared) -> FastAPI:
    """Build the application. It opens the client that all requests share, and closes it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncClient(shared.settings) as client:
            shared.client = app.state.client = client
            accounts = shared.accounts
            sampling = asyncio.create_task(_sample(shared), name="drain")
            watching = asyncio.create_task(watch_keys(shared), name="keys")
            flushing = asyncio.create_task(accounts.keep_flushing(client.account), name="accounts")
            try:
                async with metrics.serving(shared.metrics_listeners, shared.metrics):
                    yield
            finally:
                shared.metrics.close()
                sampling.cancel()
                watching.cancel()
                flushing.cancel()
                with suppress(GpuinferError):
                    await accounts.flush(client.account)

    app = FastAPI(
        title="gpuinfer",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.settings = shared.settings
    app.include_router(documented.predict)
    app.include_router(documented.result)
    app.include_router(router)
    app.include_router(tasks.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(oip_documented.router)
    add_docs(app)
    _handle_errors(app, shared)
    return app


async def _sample(shared: Shared) -> None:
    """Measure the drain rate of the queues."""
    while True:
        with suppress(GpuinferError):  # requests report it
            shared.drain.sample(await shared.client.claimed())
        await asyncio.sleep(EVERY_S)


async def watch_keys(shared: Shared) -> None:
    """Read changed keys within a second, and send their weights to Redis."""
    told: dict[str, float] | None = None
    told_at = 0.0
    failed = False
    while True:
        try:
            shared.keys.refresh()
            failed = False
        except Exception:  # keep the current keys; the next refresh may succeed
            if not failed:
                log.exception("keys_not_looked_at", folder=str(shared.keys.path))
            failed = True
        weights = {name: float(key.weight) for name, key in shared.keys.keys.items() if key.weight != 1}
        # Repeated, so that an emptied or restored Redis gets them, too.
        due = weights != told or (weights and time.monotonic() - told_at > WEIGH_EVERY_S)
        if due and (shared.keys or told):
            with suppress(GpuinferError):  # requests report it; they are sent again at the next check
                await shared.client.weigh(weights)
                told, told_at = weights, time.monotonic()
        await asyncio.sleep(CHECK_EVERY_S)


def methods(app: FastAPI) -> Methods:
    """Return a lookup of a path's methods. The API description is built on first use."""

    @cache
    def known() -> Methods:
        return methods_of(app.openapi()["paths"], PAGES)

    def of(path: str) -> frozenset[str]:
        return known()(path)

    return of


def _handle_errors(app: FastAPI, shared: Shared) -> None:
    """Use one body for all errors. An unexpected one becomes internal_error, without details."""

    async def ours(request: Request, exc: Exception) -> Response:
        error = (
            exc
            if isinstance(exc, GpuinferError)
            else GpuinferError("this is a bug in gpuinfer; see the API's log")
        )
        note(request.scope, code=error.code, **_cause(error))
        seconds = shared.retry_after(error, error.http_status)
        headers = None if seconds is None else {"retry-after": str(seconds)}
        return answer({"error": error_for(request.scope, error)}, error.http_status, headers)

    async def http(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)  # noqa: S101  registered for this type below
        code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_")
        said = _UNROUTED.get(str(exc.detail), str(exc.detail))
        return answer(_error(code, said), exc.status_code, dict(exc.headers or {}))

    async def validation(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)  # noqa: S101  registered for this type below
        first: dict[str, Any] = exc.errors()[0]
        error = InputError(str(first["msg"]), str(first["loc"][-1]))
        return answer({"error": error.to_dict()}, error.http_status)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED)

    app.add_exception_handler(GpuinferError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, ours)


def _cause(error: GpuinferError) -> dict[str, str]:
    """Return the reason for the log; empty for a client's mistake, which only its answer reports."""
    return {"reason": str(error)} if error.http_status in (401, 403, 429, 503) else {}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}
