# SPDX-License-Identifier: Apache-2.0
"""What runs the workers: systemd, or plain processes. One contract for both.

- ``states`` returns the state of every instance; the effect of an accepted command shows there soon.
- ``act`` does not wait for the result. Starting a worker that runs is no error, nor is stopping one that does
  not.
- A stop drains: the worker finishes its batch and hands the rest back.
- An instance that fails is ``failed`` until it is started again; while systemd retries it by itself it is
  ``activating``, and ``restarts`` counts the retries.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gpuinfer.errors import UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.log import get_logger
from gpuinfer.watcher.state import Action, Key, UnitState, Verb

log = get_logger(__name__)

#: When the watcher is told to stop, it stops again what it started within this many seconds: a stop of all
#: workers just before had no effect on one that did not run yet.
UNDO_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitView:
    """The state of one instance."""

    state: UnitState = "inactive"
    #: How long it has been in that state.
    age_s: float = 0.0
    enabled: bool = False
    masked: bool = False
    #: The target of all workers was stopped: none is to run.
    target_stopped: bool = False
    #: systemd has a job for it that waits for its turn.
    queued: bool = False
    #: How often it was restarted automatically since it was last started.
    restarts: int = 0
    #: How long ago it last became ready; None: never, as far as is known.
    ready_age_s: float | None = None


class Units(Protocol):
    """Runs the instances of this host. All methods raise UnitsUnavailable when it cannot be reached."""

    async def open(self) -> None:
        """Connect."""

    async def states(self, numbers: Collection[int]) -> Mapping[int, UnitView]:
        """Return the state of these instances, and of any other that is enabled or not inactive."""

    async def act(self, verb: Verb, number: int) -> None:
        """Start or stop one instance; a start clears a failure first.

        Raises UnitRefused when that is not allowed, UnitStopping for the start of one that is being stopped.
        """

    async def close(self) -> None:
        """Disconnect; systemd's workers run on, plain processes drain and end."""


class Commands:
    """Carries out decisions with one host's units, and reports what was refused."""

    def __init__(self, units: Units) -> None:
        self._units = units
        #: The reason that was logged last for each instance.
        self._refused: dict[Key, str] = {}
        #: Instance -> when it was told to start, on the monotonic clock.
        self._started: dict[Key, float] = {}

    async def do(self, action: Action) -> str:
        """Carry it out. Returns why a start is refused for good; empty if it is not."""
        key = action.key
        try:
            await self._units.act(action.verb, key.number)
            self._refused.pop(key, None)
        except UnitStopping as exc:
            log.info("start_dropped", worker=str(key), reason=str(exc))
            return ""
        except (UnitRefused, UnitsUnavailable) as exc:
            if self._refused.get(key) != str(exc):
                log.error("action_failed", verb=action.verb, worker=str(key), reason=str(exc))
            self._refused[key] = str(exc)
            if isinstance(exc, UnitRefused):
                return str(exc) if action.verb == "start" else ""
        if action.verb == "start":
            self._started[key] = time.monotonic()
        else:
            self._started.pop(key, None)
        return ""

    def recent(self) -> list[Key]:
        """Return what was started a moment ago."""
        since = time.monotonic() - UNDO_S
        return [key for key, at in self._started.items() if at >= since]

    async def undo(self, started: Iterable[Key]) -> None:
        """Stop what was started a moment ago."""
        for key in started:
            try:
                await self._units.act("stop", key.number)
                log.info("start_undone", worker=str(key), why="the watcher was told to stop right after it")
            except (UnitRefused, UnitsUnavailable) as exc:
                log.warning("start_not_undone", worker=str(key), reason=str(exc))
