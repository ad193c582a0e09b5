# SPDX-License-Identifier: Apache-2.0
"""Counts a worker's batches: device time by caller, waiting and running times of tasks, batch sizes.

Counts are sent to Redis once a second, and at the end. A batch interrupted by a kill is not counted; its
tasks run again.
"""

from __future__ import annotations

from bisect import bisect_left

from gpuinfer.queue.keys import place_of
from gpuinfer.queue.store import Store
from gpuinfer.queue.tally import SIZES, TIMES_S, Tally, bucket
from gpuinfer.worker.buffer import Batch
from gpuinfer.worker.task import Task

_NONE = [0] * (len(TIMES_S) + 1)


class _Times:
    """Waiting, running and total times of one list's tasks: counts by bucket, and sums."""

    __slots__ = ("ran", "ran_s", "took", "took_s", "waited", "waited_s")

    def __init__(self) -> None:
        self.waited, self.ran, self.took = _NONE.copy(), _NONE.copy(), _NONE.copy()
        self.waited_s = self.ran_s = self.took_s = 0.0


class Accounts:
    """The counts of one worker. For its main thread."""

    def __init__(self, store: Store, tally: Tally | None = None) -> None:
        self._store = store
        self._tally = tally or Tally()
        #: List and model -> its tasks' times.
        self._times: dict[tuple[str, str], _Times] = {}
        #: List and model -> device seconds.
        self._device: dict[tuple[str, str], float] = {}
        #: Model -> batch size -> number of batches.
        self._sizes: dict[str, dict[int, int]] = {}
        #: Total device seconds of this process.
        self.busy_s = 0.0

    def ran(self, batch: Batch, seconds: float) -> None:
        """Count a finished batch; its device time is divided among its inputs."""
        self.busy_s += seconds
        model, size = batch.model, batch.size
        sizes = self._sizes.setdefault(model, {})
        sizes[size] = sizes.get(size, 0) + 1
        inputs: dict[str, int] = {}
        for task, start, stop in batch.parts:
            name = task.claimed.list_key
            inputs[name] = inputs.get(name, 0) + stop - start
        for name, count in inputs.items():
            place = (name, model)
            self._device[place] = self._device.get(place, 0.0) + seconds * count / size

    def ended(self, task: Task, now: float) -> None:
        """Count a task that ends at ``now`` (wall clock; the producer's clock may differ)."""
        place = (task.claimed.list_key, task.model)
        times = self._times.get(place)
        if times is None:
            times = self._times[place] = _Times()
        ran_s, sent, began = task.ran_s, task.envelope.sent_at, task.time_start
        times.ran[bisect_left(TIMES_S, ran_s)] += 1
        times.ran_s += ran_s
        if sent is not None and began is not None:
            waited_s = began - sent if began > sent else 0.0
            took_s = now - sent if now > sent else 0.0
            times.waited[bisect_left(TIMES_S, waited_s)] += 1
            times.waited_s += waited_s
            times.took[bisect_left(TIMES_S, took_s)] += 1
            times.took_s += took_s

    def flush(self, *, last: bool = False) -> None:
        """Send new counts to Redis, once a second or at the end. Raises redis-py's errors; counts are kept
        then."""
        tally = self._tally
        if not last and not tally.elapsed:
            return
        self._gather()
        if tally.dirty:
            self._store.account(tally.args())
            tally.confirm()

    def _gather(self) -> None:
        """Move the counts to the tally."""
        tally = self._tally
        for (name, model), seconds in self._device.items():
            caller, micros = place_of(name).caller, round(seconds * 1e6)
            tally.use("device_us", caller, model, micros)
            tally.count("device_us", caller, model, count=micros)
        for model, sizes in self._sizes.items():
            for size, count in sizes.items():
                tally.count(bucket("batch", bisect_left(SIZES, size)), "", model, count=count)
                tally.count("batch_sum", "", model, count=size * count)
        for (name, model), times in self._times.items():
            tier = place_of(name).tier
            for kind, counts, seconds in (
                ("wait", times.waited, times.waited_s),
                ("run", times.ran, times.ran_s),
                ("total", times.took, times.took_s),
            ):
                for number, count in enumerate(counts):
                    if count:
                        tally.count(bucket(kind, number), tier, model, count=count)
                if seconds:
                    tally.count(f"{kind}_us", tier, model, count=round(seconds * 1e6))
        self._device, self._sizes, self._times = {}, {}, {}
