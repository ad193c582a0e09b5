# SPDX-License-Identifier: Apache-2.0
"""What a process of the front tells its parent: that it serves and lives, and what it has of requests.

The parent writes the request log for all: one line of counts a minute, and one episode for a trouble that all
of them have. A process tells once a second.
"""

from __future__ import annotations

import socket
from typing import Any, Literal

import orjson

from gpuinfer.api.request_log import NAMED_MISTAKES, is_episode, tell_one

#: A message has at most this many bytes.
MESSAGE_BYTES = 256 * 1024


class Link:
    """A child's end of the connection to its parent. It takes the place of systemd's socket, too."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection

    def fileno(self) -> int:
        """Return the descriptor, which can be read when the parent has gone."""
        return self._connection.fileno()

    def notify(self, state: str) -> None:
        """Take what is said to systemd: of that, the parent hears of READY and WATCHDOG."""
        if "READY=1" in state:
            self.send({"ready": True})
        elif "WATCHDOG=1" in state:
            self.send({})

    def send(self, message: dict[str, Any]) -> bool:
        """Tell the parent; False: it does not listen now."""
        try:
            self._connection.send(orjson.dumps(message))
        except OSError:  # its buffer is full, or it is gone, which ends us soon
            return False
        return True


class Told:
    """Requests since the last message, in numbers and examples."""

    def __init__(self) -> None:
        self.succeeded = self.accepted = self.mistakes = 0
        self.longest_s = 0.0
        #: Mistakes that may have a line of their own.
        self.named: list[tuple[str, float, dict[str, Any]]] = []
        #: Status, code and reason -> the fields of the first, and how many there were.
        self.troubles: dict[str, tuple[int, dict[str, Any], int]] = {}

    def __bool__(self) -> bool:
        return bool(self.succeeded or self.mistakes or self.troubles)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a message has it."""
        return {**vars(self), "troubles": list(self.troubles.values())}


class Relay:
    """Takes the place of RequestLog in a child."""

    def __init__(
        self, link: Link, said: Literal["trouble", "all"] = "trouble", most_reasons: int = 100
    ) -> None:
        self._link = link
        self._all = said == "all"
        self._most_reasons = most_reasons
        self._told = Told()

    def count(self, status: int, seconds: float) -> bool:
        """Note a request that has succeeded, as RequestLog does."""
        if self._all:
            return False
        told = self._told
        told.succeeded += 1
        told.accepted += status == 202
        told.longest_s = max(told.longest_s, seconds)
        return True

    def add(self, action: str, status: int, seconds: float, fields: dict[str, Any]) -> None:
        """Note a request that has been answered, as RequestLog does."""
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
        """Tell the parent what there is. What it cannot take now is told later."""
        if self._told and self._link.send({"requests": self._told.to_dict()}):
            self._told = Told()

    def close(self) -> None:
        """Tell the rest."""
        self.tick()
