# SPDX-License-Identifier: Apache-2.0
"""Messages from an API process to its parent: readiness, watchdog, and requests.

The parent writes one request log for all processes: a line of counts per minute, and one episode per problem.
Each process sends a message once a second.
"""

from __future__ import annotations

import socket
from typing import Any, Literal

import orjson

from gpuinfer.api.request_log import NAMED_MISTAKES, is_episode, tell_one

#: Maximum bytes of a message.
MESSAGE_BYTES = 256 * 1024


class Link:
    """A child's end of the connection to its parent. Also replaces systemd's notify socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when the parent dies."""
        return self._connection.fileno()

    def notify(self, state: str) -> None:
        """Pass READY and WATCHDOG notifications on to the parent."""
        if "READY=1" in state:
            self.send({"ready": True})
        elif "WATCHDOG=1" in state:
            self.send({})

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message to the parent; return whether that worked."""
        try:
            self._connection.send(orjson.dumps(message))
        except OSError:  # its buffer is full, or it is dead, and this process stops soon
            return False
        return True


class Told:
    """Requests since the last message: counts and examples."""

    def __init__(self) -> None:
        self.succeeded = self.accepted = self.mistakes = 0
        self.longest_s = 0.0
        #: Client errors to be logged individually.
        self.named: list[tuple[str, float, dict[str, Any]]] = []
        #: (status, code, reason) -> fields of the first, and count.
        self.troubles: dict[str, tuple[int, dict[str, Any], int]] = {}

    def __bool__(self) -> bool:
        return bool(self.succeeded or self.mistakes or self.troubles)

    def to_dict(self) -> dict[str, Any]:
        """Return it for a message."""
        return {**vars(self), "troubles": list(self.troubles.values())}


class Relay:
    """Replaces RequestLog in a child."""

    def __init__(
        self, link: Link, said: Literal["trouble", "all"] = "trouble", most_reasons: int = 100
    ) -> None:
        self._link = link
        self._all = said == "all"
        self._most_reasons = most_reasons
        self._told = Told()

    def count(self, status: int, seconds: float) -> bool:
        """Like ``RequestLog.count``."""
        if self._all:
            return False
        told = self._told
        told.succeeded += 1
        told.accepted += status == 202
        told.longest_s = max(told.longest_s, seconds)
        return True

    def add(self, action: str, status: int, seconds: float, fields: dict[str, Any]) -> None:
        """Like ``RequestLog.add``."""
        told = self._told
        if is_episode(status):
            self._trouble(status, fields)
        elif status >= 400:
            told.mistakes += 1
            if self._all:
                tell_one(action, seconds, fields)
            elif len(told.named) < NAMED_MISTAKES:
                told.named.append((action, seconds, fields))
        else:
            told.succeeded += 1
            told.accepted += status == 202
            told.longest_s = max(told.longest_s, seconds)
            if self._all:
                tell_one(action, seconds, fields)

    def _trouble(self, status: int, fields: dict[str, Any]) -> None:
        troubles = self._told.troubles
        key = f"{status} {fields.get('code')} {fields.get('reason')}"
        known = troubles.get(key)
        if known is None and len(troubles) >= self._most_reasons:
            key = next(iter(troubles))
            known = troubles[key]
        troubles[key] = (status, fields, 1) if known is None else (known[0], known[1], known[2] + 1)

    def tick(self) -> None:
        """Send what there is to the parent; what fails is sent again later."""
        if self._told and self._link.send({"requests": self._told.to_dict()}):
            self._told = Told()

    def close(self) -> None:
        """Send the rest."""
        self.tick()
