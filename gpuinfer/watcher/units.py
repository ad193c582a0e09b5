# SPDX-License-Identifier: Apache-2.0
"""What the watcher needs of what runs the workers: systemd, or plain processes. One contract for both.

- ``look`` tells the state of every instance; it reflects a command that was accepted at once or soon.
- ``act`` asks, and does not wait until it is done. To start what runs is no error, nor to stop what does not.
- a stop drains: the worker finishes its batch and hands the rest back.
- what fails on its own is ``failed`` until it is reset or started; what is tried again before that is
  ``activating`` meanwhile, and ``restarts`` counts how often.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gpuinfer.watcher.state import UnitState, Verb


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitView:
    """One instance, as it is now."""

    state: UnitState = "inactive"
    #: For how long it has been in that state.
    age_s: float = 0.0
    enabled: bool = False
    masked: bool = False
    #: Something is to be done with it, and waits for its turn.
    queued: bool = False
    #: How often it was restarted by itself since somebody has started it.
    restarts: int = 0


class Units(Protocol):
    """Runs the instances of this host. All methods raise UnitsUnavailable when it cannot be reached."""

    async def open(self) -> None:
        """Connect."""

    async def look(self) -> Mapping[int, UnitView]:
        """Return every instance's state."""

    async def act(self, verb: Verb, number: int) -> None:
        """Start, stop or reset one instance.

        Raises UnitRefused when that is not allowed, UnitStopping for the start of what is being stopped.
        """

    async def close(self) -> None:
        """Disconnect; systemd's workers run on, plain processes drain and end."""
