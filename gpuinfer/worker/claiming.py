# SPDX-License-Identifier: Apache-2.0
"""Decides what to claim next, reads claimed tasks into the buffer, and returns what is too much."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gpuinfer.queue.claims import Claimed, Want, Wants
from gpuinfer.queue.sink import TaskChannel
from gpuinfer.worker.holdings import Holdings
from gpuinfer.worker.pace import Pace


class Claiming:
    """Chooses how much a worker claims: up to a batch, and less after part of a claim was returned."""

    def __init__(self, holdings: Holdings, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self._held = holdings
        self._pace = pace
        self._clock = clock
        #: The most tasks that one claim takes.
        self._stride = self._longest

    @property
    def _longest(self) -> int:
        """The most tasks that fill a batch."""
        return max(self._held.engine.limit(name) for name in self._held.models)

    def fills(self, claims: Sequence[Claimed]) -> bool:
        """Tell whether a claim took as many tasks as it could: more may wait in Redis."""
        model = claims[0].model or next(iter(self._held.models))
        return len(claims) >= min(self._stride, self._held.engine.limit(model))

    def wants(self) -> Wants:
        """Return what to claim: up to a batch of any model.

        If a batch is already waiting, claim only tasks that fill it up or are more urgent.

        No other worker can run tasks that this one holds. So nothing is claimed while a long batch runs,
        while claimed tasks wait to be read, or while a probe tests this GPU.
        """
        held, engine = self._held, self._held.engine
        if held.closed or engine.probing or held.intake.waiting:
            return {}
        long = self._pace.long()
        if long and not self._pace.due():
            return {}
        held.buffer.wake(self._clock())
        affordable = int(held.spare_bytes / held.intake.task_bytes)
        # Behind a long batch, hold only the batch that is being prepared.
        ahead = engine.ahead if long else None
        batch = ahead or held.buffer.next_batch()
        wants: dict[str, Want] = {}
        for model, manifest in held.models.items():
            count = min(self._stride, engine.limit(model), max(1, affordable))
            want = Want(count, least=manifest.min_batch_size)
            if batch is not None:
                rank = batch.tasks[0].place[0]
                if model == batch.model:
                    spare = min(held.buffer.spare(model) - (ahead.size if ahead else 0), affordable)
                    want = Want(min(count, spare), least=1)
                    rank = batch.tasks[-1].place[0]
                if model != batch.model or want.count <= 0:
                    want = Want(count if rank > 0 else 0, better_than=rank)
            if want.count > 0:
                wants[model] = want
        return wants

    def read(self, channel: TaskChannel | None, claims: Sequence[Claimed] = ()) -> None:
        """Read claimed tasks, and those that waited to be read, into the buffer.

        Tasks that can never run fail here. Without a channel, nothing is read.
        """
        if channel is None:
            return
        held = self._held
        came = len(claims) + len(held.intake.waiting)
        tasks, finals, unread = held.intake.read(channel, claims, held.engine.chargeable, held.spare_bytes)
        held.buffer.add_all(tasks)
        if finals:
            held.settle(finals)
        self._return_surplus(came, unread)

    def _return_surplus(self, came: int, unread: Sequence[Claimed]) -> None:
        """Put back tasks that the next batches do not need or memory cannot hold; then claim fewer next time.

        ``came``: how many tasks were to be read. If none goes back, the next claim may be larger.
        """
        held = self._held
        tasks = held.buffer.surplus(held.spare_bytes + held.buffer.size)
        if not tasks and not unread:
            if came >= self._stride:
                self._stride = min(self._longest, 2 * self._stride)
            return
        self._stride = max(1, came - len(tasks) - len(unread))
        held.put_back(tasks, unread)
