# SPDX-License-Identifier: Apache-2.0
"""Answers as plain ASGI messages, for routes that do without FastAPI. JSON ends with a newline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.types import Scope, Send

from gpuinfer.api.answers import encode
from gpuinfer.api.middleware import note
from gpuinfer.api.shared import shared
from gpuinfer.errors import GpuinferError

Headers = Iterable[tuple[bytes, bytes]]
JSON = b"application/json"


async def send_bytes(
    scope: Scope, send: Send, content: bytes, content_type: bytes, status: int = 200, headers: Headers = ()
) -> None:
    """Answer with a body as it is."""
    head = [(b"content-type", content_type), (b"content-length", b"%d" % len(content)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content})


async def send_json(scope: Scope, send: Send, body: Any, status: int = 200, headers: Headers = ()) -> None:
    """Answer with JSON."""
    await send_bytes(scope, send, encode(body), JSON, status, headers)


async def send_error(scope: Scope, send: Send, error: GpuinferError) -> None:
    """Answer ``{"error": {"code", "message", "field"?}}`` with the error's status, and note its code.

    What could not be served has ``Retry-After``. What a client did wrong is in its answer alone.
    """
    status, headers = error.http_status, []
    reason = {"reason": str(error)} if status in (429, 503) else {}
    note(scope, code=error.code, **reason)
    if reason:
        headers.append((b"retry-after", b"%d" % (shared(scope).retry_after(error) or 1)))
    if status == 408:  # the rest of its body is not read
        headers.append((b"connection", b"close"))
    await send_json(scope, send, {"error": error.to_dict()}, status, headers)
