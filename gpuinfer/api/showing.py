# SPDX-License-Identifier: Apache-2.0
"""A task as the API answers with it, with its place while it waits."""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

from gpuinfer.api.reply import error_for
from gpuinfer.api.shared import shared
from gpuinfer.queue.resource import to_resource
from gpuinfer.queue.results import TaskStatus


async def shown(scope: Scope, status: TaskStatus) -> dict[str, Any]:
    """Return a task for JSON; of one that waits, its place is looked up. Raises BrokerError."""
    place = None if status.state != "queued" else await shared(scope).client.place(status)
    return _plain(scope, status, to_resource(status, place))


def state(scope: Scope, status: TaskStatus) -> dict[str, Any]:
    """Return a task's state for JSON: ``/result`` has it so."""
    return _plain(scope, status, status.to_dict())


def _plain(scope: Scope, status: TaskStatus, body: dict[str, Any]) -> dict[str, Any]:
    """Return it with the task's error as this request's caller may see it."""
    if status.error is not None:
        body["error"] = error_for(scope, status.error)
    return body
