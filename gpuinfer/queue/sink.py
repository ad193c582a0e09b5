# SPDX-License-Identifier: Apache-2.0
"""The interface between transport and worker: the channel claims tasks, and the sink takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpuinfer.errors import TakenBack, UnusableRedis, WorkerRunning
from gpuinfer.queue.claims import Claimed, State, Wants
from gpuinfer.queue.store import Store


class TaskChannel(Protocol):
    """The part of the channel that a sink uses."""

    def claim(self, *, search: bool = False) -> int:
        """Claim the wanted tasks and pass them to the sink; return how many.

        ``search``: first check the lists that plain producers may have filled.
        """

    def again(self) -> None:
        """Claim after a batch has ended."""

    def withdraw(self) -> None:
        """Cancel the outstanding claim; release anything it took."""

    def deliver(self, task: Claimed) -> None:
        """Hand a task that is not ours to Celery's own strategy."""

    @property
    def silent(self) -> bool:
        """True if a plain producer, which wakes no worker, submitted tasks recently."""


class Sink(Protocol):
    """Takes claimed tasks directly from the channel; implemented by the worker's batcher."""

    @property
    def store(self) -> Store:
        """The store by which tasks are claimed."""

    def wants(self) -> Wants:
        """Return what to claim now; empty for nothing."""

    @property
    def state(self) -> State:
        """What this worker does; idle: it holds no tasks, and would run the next one at once."""

    def receive(self, channel: TaskChannel, tasks: Sequence[Claimed]) -> None:
        """Take over claimed tasks. Must not raise."""

    def held(self) -> set[int]:
        """Return the sequence ids of all tasks held."""

    def fenced(self, error: WorkerRunning | TakenBack | UnusableRedis) -> None:
        """React to a refused claim.

        If another process claims under this worker's name, or if Redis has another format, this process ends.
        If a reaper has taken this worker for dead, the worker begins a new epoch.
        """
