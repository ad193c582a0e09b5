# SPDX-License-Identifier: Apache-2.0
"""Answers as plain ASGI messages, for routes without FastAPI. JSON ends with a newline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Scope, Send

from gpuinfer.api import public, rates
from gpuinfer.api.access import caller, sees_hosts
from gpuinfer.api.answers import encode
from gpuinfer.api.middleware import note
from gpuinfer.api.shared import shared
from gpuinfer.errors import GpuinferError, RateLimited, Unauthorized
from gpuinfer.log import get_logger

log = get_logger(__name__)

Headers = Iterable[tuple[bytes, bytes]]
#: Sends an error in a protocol's format.
Fail = Callable[[Scope, Send, GpuinferError], Awaitable[None]]
JSON = b"application/json"
#: WWW-Authenticate without a token, and with an invalid one.
_CHALLENGES = (b'Bearer realm="gpuinfer"', b'Bearer realm="gpuinfer", error="invalid_token"')


async def send_bytes(
    scope: Scope, send: Send, content: bytes, content_type: bytes, status: int = 200, headers: Headers = ()
) -> None:
    """Answer with a body of bytes."""
    headers = [*headers, *rates.told(scope)]
    answer = getattr(send, "answer", None)
    if answer is not None and answer(status, content_type, headers, content):
        return
    head = [(b"content-type", content_type), (b"content-length", b"%d" % len(content)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content})


async def send_json(scope: Scope, send: Send, body: Any, status: int = 200, headers: Headers = ()) -> None:
    """Answer with JSON."""
    await send_bytes(scope, send, encode(body), JSON, status, headers)


async def send_error(scope: Scope, send: Send, error: GpuinferError) -> None:
    """Answer ``{"error": {"code", "message", "field"?}}`` with the error's status, and record its code."""
    status = error.http_status
    body = {"error": error_for(scope, error)}
    await send_json(scope, send, body, status, noted(scope, error, status))


def error_for(scope: Scope, error: GpuinferError) -> dict[str, Any]:
    """Return an error for JSON, with the details that the caller may see."""
    return error.to_dict() if sees_hosts(scope) else public.told(error, scope["path"])


def noted(scope: Scope, error: GpuinferError, status: int) -> Headers:
    """Record an error's code, and return the headers of its answer.

    401 has ``WWW-Authenticate``; lack of capacity has ``Retry-After``, and its reason is recorded for the
    log. Other client errors are only in the answer.
    """
    headers = []
    if isinstance(error, RateLimited):
        rates.refused(scope, caller(scope).key, error)
    if isinstance(error, Unauthorized):  # RFC 6750
        headers.append((b"www-authenticate", _CHALLENGES[error.refused_token]))
    seconds = shared(scope).retry_after(error, status)
    reason = {} if seconds is None and status not in (401, 403) else {"reason": str(error)}
    note(scope, code=error.code, **reason)
    if seconds is not None:
        headers.append((b"retry-after", b"%d" % seconds))
    if status == 408:  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    return headers


async def answered(scope: Scope, send: Send, route: Awaitable[None], fail: Fail = send_error) -> None:
    """Let a route answer; if it raises, answer with the error, unless the client has disconnected."""
    try:
        await route
    except GpuinferError as exc:
        await fail(scope, send, exc)
    except ClientDisconnect:
        pass
    except Exception:
        log.exception("request_failed", method=scope["method"], path=scope["path"][:200])
        await fail(scope, send, GpuinferError("this is a bug in gpuinfer; see the API's log"))
