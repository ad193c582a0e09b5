# SPDX-License-Identifier: Apache-2.0
"""Identifies the caller of each request, once, before routing. ``rights`` says which role may do what.

Tasks a role may view: ``read`` those submitted without a key (by Celery producers, over the Unix socket, over
loopback), ``predict`` also its own, ``admin`` all. Tasks it may change: ``predict`` its own, ``admin`` all.
For another key's task the answer is the same as for an unknown id.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.types import Scope

from gpuinfer.api.middleware import note
from gpuinfer.api.network import key_needed
from gpuinfer.api.rights import Verb, may, needed, verb_of
from gpuinfer.api.shared import Shared, shared
from gpuinfer.errors import Forbidden, TaskNotFound, Unauthorized
from gpuinfer.keys.folder import KeyFolder
from gpuinfer.keys.key import Key, Role
from gpuinfer.log import get_logger

log = get_logger(__name__)

_CALLER = "gpuinfer.caller"
_BEARER = b"bearer "


class Caller(NamedTuple):
    """The caller of a request."""

    #: The name of the key; empty: no key (Unix socket, loopback while there are no keys, anonymous network).
    name: str
    role: Role
    key: Key | None = None
    #: Whether it came over the Unix socket, or over loopback while there are no keys.
    local: bool = False

    @property
    def readable(self) -> str | None:
        """``only`` for viewing a task: the caller whose tasks are visible, as are those without a caller."""
        return None if self.role == "admin" else self.name if self.role == "predict" else ""

    @property
    def changeable(self) -> str | None:
        """``only`` for changing a task: the caller whose tasks may be changed."""
        return None if self.role == "admin" else self.name


#: The caller of a request that needs no key, or that was refused.
NOBODY = Caller("", "read")
_LOCAL = Caller("", "admin", local=True)
_ANONYMOUS = Caller("", "predict")


def caller(scope: Scope) -> Caller:
    """Return the caller of a request, as stored by ``admit``."""
    found: Caller = scope[_CALLER]
    return found


def sees_hosts(scope: Scope) -> bool:
    """Whether the answer may contain details of hosts: paths, processes, tracebacks."""
    found: Caller | None = scope.get(_CALLER)
    return found is not None and found.role == "admin"


def admit(scope: Scope) -> Caller:
    """Identify the caller of a request and store it in the scope.

    Raises Unauthorized; Forbidden if the caller's role does not allow the request; ForeignHost and
    ForeignOrigin if another site uses the client's right to call without a key.
    """
    verb = verb_of(scope["method"], scope["path"])
    try:
        found = _found(scope, shared(scope))
    except (Unauthorized, Forbidden):
        scope[_CALLER] = NOBODY
        if verb != "health":
            client = scope.get("client")
            note(scope, client=client[0] if client else "unix")
            raise
        return NOBODY
    scope[_CALLER] = found
    if not may(found.role, verb):
        raise _forbidden(scope, found, verb)
    return found


def check_model(scope: Scope, model: str | None) -> None:
    """Raise Forbidden for a model that the caller's key may not use; None: the default, not known yet."""
    key = caller(scope).key
    if key is not None and key.models and model not in key.models:
        named = ", ".join(key.models)
        said = "names no model" if model is None else f"may not use {model[:80]!r}"
        raise Forbidden(f"the key {key.name} {said}; it may use: {named}", "model")


def check_queue(scope: Scope, queue: str) -> None:
    """Raise Forbidden for a queue that the caller's key may not use."""
    key = caller(scope).key
    if key is not None and key.queues and queue not in key.queues:
        named = ", ".join(key.queues)
        raise Forbidden(f"the key {key.name} may not use {queue[:80]!r}; it may use: {named}", "queue")


def sees_model(scope: Scope, model: str) -> bool:
    """Whether the caller's key may use a model, and so see it."""
    key = caller(scope).key
    return key is None or not key.models or model in key.models


@asynccontextmanager
async def changing(scope: Scope, task_id: str) -> AsyncIterator[str | None]:
    """Yield ``only`` for changing a task. Raises Forbidden if the caller may only view it.

    That is a task submitted without a key. Raises TaskNotFound for an unknown id and for another key's task.
    """
    who = caller(scope)
    try:
        yield who.changeable
    except TaskNotFound:
        if who.changeable is None:
            raise
        status = await shared(scope).client.status(task_id, only=who.readable)
        if status.caller == who.name:
            raise
        words = f"task {task_id} was submitted without a key: changing it needs a key with the role admin"
        raise Forbidden(words, "task_id") from None
    audit(scope, task_id=task_id)


def audit(scope: Scope, model: str | None = None, task_id: str | None = None) -> None:
    """Log an administrator's action, if keys are in use."""
    who = caller(scope)
    if who.role == "admin" and (who.key is not None or shared(scope).keys):
        about = {"model": model, "task_id": task_id}
        known = {name: value[:200] for name, value in about.items() if value is not None}
        did = f"{scope['method']} {scope['path'][:200]}"
        log.info("admin_act", key=who.name or "-", did=did, **known)


def _forbidden(scope: Scope, found: Caller, verb: Verb) -> Forbidden:
    who = f"the key {found.name} has the role {found.role}" if found.key else "no key was given"
    what = f"{scope['method']} {scope['path'][:200]}"
    return Forbidden(f"{what} needs a key with the role {needed(verb)}, and {who}")


def _found(scope: Scope, ours: Shared) -> Caller:
    """Raises Unauthorized, ForeignHost, ForeignOrigin."""
    keys = ours.keys
    token, page = _shown(scope)
    if token is not None:
        if page:
            ours.network.check(scope, "network")
        key = keys.find(token)
        if key is None:
            raise _refused(keys, token)
        return Caller(key.name, key.role, key)
    in_use = bool(keys)
    came = ours.network.arrival(scope, keys=in_use)
    ours.network.check(scope, came)
    if came == "unix" or (came == "loopback" and not in_use):
        return _LOCAL
    if came == "anonymous":
        return _ANONYMOUS
    if keys.unreadable:
        raise Unauthorized("this needs a key, but this server cannot read its keys; see its log")
    raise Unauthorized(key_needed(keys=in_use))


def _shown(scope: Scope) -> tuple[bytes | None, bool]:
    """Return the token of ``Authorization: Bearer`` or ``X-API-Key``, and whether a web page sent the
    request."""
    token = other = None
    page = False
    for name, value in scope["headers"]:
        if name == b"authorization":
            if value[:7].lower() == _BEARER:
                token = value[7:].strip()
        elif name == b"x-api-key":
            other = value.strip()
        elif name == b"origin":
            page = True
    return (other if token is None else token), page


def _refused(keys: KeyFolder, token: bytes) -> Unauthorized:
    why = "has expired" if keys.has_expired(token) else "is unknown or was revoked"
    error = Unauthorized(f"this key {why}")
    error.refused_token = True
    return error
