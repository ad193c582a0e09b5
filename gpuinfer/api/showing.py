# SPDX-License-Identifier: Apache-2.0
"""A task as the API answers with it, with its place while it waits."""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

from gpuinfer.api.shared import shared
from gpuinfer.queue.resource import to_resource
from gpuinfer.queue.results import TaskStatus


async def shown(scope: Scope, status: TaskStatus) -> dict[str, Any]:
    """Return a task for JSON; of one that waits, its place is looked up. Raises BrokerError."""
    place = None if status.state != "queued" else await shared(scope).client.place(status)
    return to_resource(status, place)
