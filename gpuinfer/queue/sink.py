# SPDX-License-Identifier: Apache-2.0
"""What the transport asks of whoever takes its claimed tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from gpuinfer.errors import WorkerRunning
from gpuinfer.queue.store import Claimed, Store

if TYPE_CHECKING:
    from gpuinfer.queue.transport import Channel


class Sink(Protocol):
    """Who takes claimed tasks straight from the channel: the worker's batcher."""

    @property
    def store(self) -> Store:
        """The store tasks are claimed with."""

    def room(self) -> tuple[int, int | None]:
        """Return how many tasks to claim now, and the rank they must be better than, if any."""

    @property
    def idle(self) -> bool:
        """True when nothing is held, and what is claimed next runs at once."""

    def receive(self, channel: Channel, tasks: Sequence[Claimed]) -> None:
        """Take over claimed tasks. Must not raise."""

    def held(self) -> set[int]:
        """Return the seqs of all tasks held."""

    def fenced(self, error: WorkerRunning) -> None:
        """Another process claims under this worker's name: end this one."""
