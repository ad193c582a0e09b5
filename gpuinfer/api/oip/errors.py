# SPDX-License-Identifier: Apache-2.0
"""Errors as the protocol has them: ``{"error": "..."}``, and a status that is not 200."""

from __future__ import annotations

from starlette.types import Scope, Send

from gpuinfer.api.reply import error_for, noted, send_json
from gpuinfer.errors import GpuinferError, InputError

#: Status of ours -> the protocol's: a request that cannot work is 400, one that came too late is 504, and one
#: that somebody has cancelled may be sent again.
_STATUS = {422: 400, 410: 504}
_REVOKED = 503


class NotInProtocol(InputError):
    """Raised for a path or a method that the protocol has, and this server has not, or nobody has."""

    code = "not_found"
    http_status = 404


class NotSupported(InputError):
    """Raised for what the protocol has and this server cannot do."""

    code = "not_supported"
    http_status = 501


class WrongMethod(InputError):
    """Raised for a method that a path does not take."""

    code = "method_not_allowed"
    http_status = 405


def status_of(error: GpuinferError) -> int:
    """Return the HTTP status of an error."""
    return _REVOKED if error.code == "revoked" else _STATUS.get(error.http_status, error.http_status)


async def send_error(scope: Scope, send: Send, error: GpuinferError) -> None:
    """Answer with an error. What may succeed later has ``Retry-After``."""
    status = status_of(error)
    body = error_for(scope, error)
    field = f"{body['field']}: " if "field" in body else ""
    said = {"error": f"{field}{body['message']}"}
    await send_json(scope, send, said, status, noted(scope, error, status))
