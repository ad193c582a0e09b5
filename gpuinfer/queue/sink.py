# SPDX-License-Identifier: Apache-2.0
"""The seam between the transport and the worker: who takes claimed tasks, and the channel they come by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpuinfer.errors import TakenBack, UnusableRedis, WorkerRunning
from gpuinfer.queue.claims import Claimed, State, Wants
from gpuinfer.queue.store import Store


class TaskChannel(Protocol):
    """What a sink uses of the channel."""

    def claim(self, *, look: bool = False) -> int:
        """Claim what is wanted and hand it on; return how many tasks came.

        ``look``: first look into the lists that producers fill who tell nobody.
        """

    def again(self) -> None:
        """Claim when a batch has ended."""

    def withdraw(self) -> None:
        """Cancel the outstanding claim, and release what it took."""

    def deliver(self, task: Claimed) -> None:
        """Hand a task that is not ours to Celery's own strategy."""

    @property
    def silent(self) -> bool:
        """True when there were tasks of late that nobody had told of."""


class Sink(Protocol):
    """Who takes claimed tasks straight from the channel: the worker's batcher."""

    @property
    def store(self) -> Store:
        """The store tasks are claimed with."""

    def wants(self) -> Wants:
        """Return what to claim now; empty for nothing."""

    @property
    def state(self) -> State:
        """What runs here; idle when nothing is held, and what is claimed next runs at once."""

    def receive(self, channel: TaskChannel, tasks: Sequence[Claimed]) -> None:
        """Take over claimed tasks. Must not raise."""

    def held(self) -> set[int]:
        """Return the seqs of all tasks held."""

    def fenced(self, error: WorkerRunning | TakenBack | UnusableRedis) -> None:
        """Another process claims under this worker's name, or Redis has another format, and this one ends; or
        a reaper has taken this worker for dead, and it begins a new epoch."""
