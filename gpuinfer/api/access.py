# SPDX-License-Identifier: Apache-2.0
"""Who asks, and what the one may do. Each request is looked at once, before it is routed.

Roles, by what a request does::

              look at the fleet   look at tasks   submit   change tasks   change the fleet
    read             yes           nobody's (1)     -           -               -
    predict          yes           nobody's, own   yes         own              -
    admin            yes           all             yes         all             yes

(1) Tasks that no key has submitted: those of plain Celery producers, of the Unix socket, of loopback.
Another key's task is answered as if there were none: ids are not confirmed.
"""

from __future__ import annotations

from typing import NamedTuple

from starlette.types import Scope

from gpuinfer.api.shared import shared
from gpuinfer.errors import Unauthorized
from gpuinfer.keys.folder import KeyFolder
from gpuinfer.keys.key import Key, Role

_CALLER = "gpuinfer.caller"
_BEARER = b"bearer "
#: What a request is told that needs a key and has none.
_MAKE_ONE = (
    "a key is needed, as `Authorization: Bearer gpi_...`; on this host `gpuinfer key add NAME` makes one"
)


class Caller(NamedTuple):
    """Who has sent a request."""

    #: The key's name; empty: nobody in particular (Unix socket, loopback without keys, anonymous network).
    name: str
    role: Role
    key: Key | None = None
    #: Whether it came by the Unix socket, or by loopback while there are no keys.
    local: bool = False

    @property
    def readable(self) -> str | None:
        """What ``only`` is for looking at a task: the caller whose tasks it may see, beside nobody's."""
        return None if self.role == "admin" else self.name if self.role == "predict" else ""

    @property
    def changeable(self) -> str | None:
        """What ``only`` is for changing a task: the caller whose tasks alone it may change."""
        return None if self.role == "admin" else self.name


#: A request that needs no key has none.
NOBODY = Caller("", "read")
_LOCAL = Caller("", "admin", local=True)
_ANONYMOUS = Caller("", "predict")


def caller(scope: Scope) -> Caller:
    """Return who has sent a request, as ``admit`` has found."""
    found: Caller = scope[_CALLER]
    return found


def admit(scope: Scope) -> Caller:
    """Find out who has sent a request, and note it in the scope.

    Raises Unauthorized.
    """
    found = scope[_CALLER] = _found(scope, shared(scope).keys)
    return found


def _found(scope: Scope, keys: KeyFolder) -> Caller:
    token = token_of(scope)
    if token is not None:
        key = keys.find(token)
        if key is None:
            raise _refused(keys, token)
        return Caller(key.name, key.role, key)
    came = arrival(scope)
    if came == "unix" or (came == "loopback" and not keys):
        return _LOCAL
    if came == "anonymous":
        return _ANONYMOUS
    raise Unauthorized(_words(keys))


def arrival(scope: Scope) -> str:
    """Return how a request came: ``unix``, ``loopback``, ``anonymous`` or ``network``."""
    client = scope.get("client")
    if client is None:
        return "unix"
    return "loopback" if client[0] in ("127.0.0.1", "::1") else "network"


def token_of(scope: Scope) -> bytes | None:
    """Return the token of ``Authorization: Bearer`` or ``X-API-Key``; None: the request has none."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            if value[:7].lower() == _BEARER:
                return bytes(value[7:].strip())
        elif name == b"x-api-key":
            return bytes(value.strip())
    return None


def _refused(keys: KeyFolder, token: bytes) -> Unauthorized:
    why = "has expired" if keys.has_expired(token) else "is unknown, or was revoked"
    error = Unauthorized(f"this key {why}")
    error.refused_token = True
    return error


def _words(keys: KeyFolder) -> str:
    if keys.unreadable:
        return "a key is needed, and this front cannot read its keys: see its log"
    return _MAKE_ONE


__all__ = ["NOBODY", "Caller", "admit", "caller", "token_of"]
