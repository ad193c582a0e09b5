# SPDX-License-Identifier: Apache-2.0
"""What runs the workers: systemd, or plain processes. One contract for both.

- ``look`` returns the state of every instance; it shows a command that was accepted at once or soon.
- ``act`` asks and does not wait for the result. Starting a worker that runs is no error, nor is stopping one
  that does not.
- A stop drains: the worker finishes its batch and hands the rest back.
- An instance that fails is ``failed`` until it is started again; while systemd retries it by itself it is
  ``activating``, and ``restarts`` counts the retries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from gpuinfer.watcher.state import UnitState, Verb


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitView:
    """One instance, as it is now."""

    state: UnitState = "inactive"
    #: How long it has been in that state.
    age_s: float = 0.0
    enabled: bool = False
    masked: bool = False
    #: The target of all workers was stopped: nobody wants any of them now.
    target_stopped: bool = False
    #: systemd has a job for it that waits for its turn.
    queued: bool = False
    #: How often it was restarted automatically since it was last started.
    restarts: int = 0


class Units(Protocol):
    """Runs the instances of this host. All methods raise UnitsUnavailable when it cannot be reached."""

    async def open(self) -> None:
        """Connect."""

    async def look(self, numbers: Collection[int]) -> Mapping[int, UnitView]:
        """Return the state of these instances, and of any other that is enabled or not inactive."""

    async def act(self, verb: Verb, number: int) -> None:
        """Start or stop one instance; a start clears a failure first.

        Raises UnitRefused when that is not allowed, UnitStopping for the start of one that is being stopped.
        """

    async def close(self) -> None:
        """Disconnect; systemd's workers run on, plain processes drain and end."""
