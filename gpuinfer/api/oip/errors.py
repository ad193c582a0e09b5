# SPDX-License-Identifier: Apache-2.0
"""Errors in the protocol's format: ``{"error": "..."}``, with a status other than 200."""

from __future__ import annotations

from starlette.types import Scope, Send

from gpuinfer.api.reply import error_for, noted, send_json
from gpuinfer.errors import GpuinferError, InputError

#: Our status -> the protocol's: 400 for an invalid request, 504 for one that took too long; a request that
#: somebody else cancelled may be retried.
_STATUS = {422: 400, 410: 504}
_REVOKED = 503


class NotInProtocol(InputError, code="not_found", status=404):
    """Raised for a path that this server does not have, whether the protocol has it or not."""


class NotSupported(InputError, code="not_supported", status=501):
    """Raised for a feature of the protocol that this server does not have."""


class WrongMethod(InputError, code="method_not_allowed", status=405):
    """Raised for a method that a path does not accept."""


def status_of(error: GpuinferError) -> int:
    """Return the HTTP status of an error."""
    return _REVOKED if error.code == "revoked" else _STATUS.get(error.http_status, error.http_status)


async def send_error(scope: Scope, send: Send, error: GpuinferError) -> None:
    """Answer with an error; with ``Retry-After`` if a retry may succeed."""
    status = status_of(error)
    body = error_for(scope, error)
    field = f"{body['field']}: " if "field" in body else ""
    said = {"error": f"{field}{body['message']}"}
    await send_json(scope, send, said, status, noted(scope, error, status))
