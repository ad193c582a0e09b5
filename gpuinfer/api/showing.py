# SPDX-License-Identifier: Apache-2.0
"""Tasks, models and workers as the API shows them to a caller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.types import Scope

from gpuinfer.api.access import sees_hosts, sees_model
from gpuinfer.api.public import plain
from gpuinfer.api.reply import error_for
from gpuinfer.api.shared import shared
from gpuinfer.queue.resource import to_resource
from gpuinfer.queue.results import TaskStatus

#: Fields of a worker that callers other than administrators may see.
_OF_WORKERS = ("worker", "state", "models", "queues", "done", "rate", "running", "alive", "seen_s")


async def shown(scope: Scope, status: TaskStatus) -> dict[str, Any]:
    """Return a task for JSON, with its position while it waits. Raises BrokerError."""
    place = None if status.state != "queued" else await shared(scope).client.place(status)
    return _plain(scope, status, to_resource(status, place))


def state(scope: Scope, status: TaskStatus) -> dict[str, Any]:
    """Return a task's state for JSON, as in ``/result``."""
    return _plain(scope, status, status.to_dict())


def _plain(scope: Scope, status: TaskStatus, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with the details of the error that the caller may see."""
    if status.error is not None:
        body["error"] = error_for(scope, status.error)
    return owned(scope, body, status.caller)


def owned(scope: Scope, body: dict[str, Any], whose: str) -> dict[str, Any]:
    """Add the name of the key that submitted a task, for administrators."""
    return {**body, "caller": whose} if whose and sees_hosts(scope) else body


def models_for(scope: Scope, models: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the models that a caller may use; reasons for missing ones without details of hosts."""
    found = [one for one in models if sees_model(scope, one["name"])]
    if sees_hosts(scope):
        return found
    return [
        {**one, "missing": {worker: plain(why) for worker, why in one["missing"].items()}} for one in found
    ]


def workers_for(scope: Scope, workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return workers for JSON; only administrators see hosts, processes and devices."""
    if sees_hosts(scope):
        return workers
    return [{name: one[name] for name in _OF_WORKERS if name in one} for one in workers]
