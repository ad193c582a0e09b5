# SPDX-License-Identifier: Apache-2.0
"""Workers that hold tasks, and how long they have been silent.

All times are from Redis's clock: those in heartbeats, and those in the set of workers. Clocks of different
hosts are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson
import redis

from gpuinfer.queue import keys
from gpuinfer.queue.depth import known_workers
from gpuinfer.queue.heartbeats import FRESH_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A worker, and the tasks that it has claimed and not settled."""

    #: ``gpu0@host``
    worker: str
    tasks: int
    #: The number of its epoch, read before everything else here; 0: none.
    epoch: int
    #: When it was last seen, by Redis's clock; 0: never.
    seen_at: float
    #: Seconds since then.
    silent_s: float
    #: The lock domain in its last heartbeat (see ``gpuinfer.locks``); empty: unknown.
    domain: str = ""

    @property
    def silent(self) -> bool:
        """True if it has been silent for so long that it is taken for dead."""
        return self.silent_s > FRESH_S

    @property
    def host(self) -> str:
        """Return the host in its name."""
        return self.worker.partition("@")[2]


def holders(client: redis.Redis) -> list[Holder]:
    """Return the workers that hold tasks, sorted by name. Raises redis-py's errors."""
    known = known_workers(client)
    names = sorted(known)
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hlen(keys.inflight(name))
        counts = pipe.execute() if names else []
    # Two fields per task, and perhaps one more: the record of what runs.
    held = {name: fields // 2 for name, fields in zip(names, counts, strict=True) if fields > 1}
    return _read(client, list(held), known, held) if held else []


def holder(client: redis.Redis, worker: str) -> Holder:
    """Return one worker, whether it holds tasks or not. Raises redis-py's errors."""
    fields = int(client.hlen(keys.inflight(worker)))
    return _read(client, [worker], known_workers(client), {worker: fields // 2})[0]


def _read(
    client: redis.Redis, workers: Sequence[str], known: dict[str, float], held: dict[str, int]
) -> list[Holder]:
    """Return these workers. ``known``: when each was last seen; ``held``: how many tasks each holds."""
    with client.pipeline(transaction=False) as pipe:
        for worker in workers:
            pipe.hget(keys.epoch(worker), "number")
        for worker in workers:
            pipe.get(keys.heartbeat(worker))
        pipe.time()
        *found, (seconds, microseconds) = pipe.execute()
    now = seconds + microseconds / 1e6
    made = []
    for worker, epoch, text in zip(workers, found[: len(workers)], found[len(workers) :], strict=True):
        at, domain = _heartbeat(text)
        seen_at = max(at, known.get(worker, 0.0))
        made.append(
            Holder(
                worker=worker,
                tasks=held.get(worker, 0),
                epoch=int(epoch or 0),
                seen_at=seen_at,
                silent_s=max(0.0, now - seen_at),
                domain=domain,
            )
        )
    return made


def _heartbeat(text: bytes | None) -> tuple[float, str]:
    """Return when a heartbeat was sent, and its lock domain; (0, '') if it cannot be read."""
    try:
        body = orjson.loads(text or b"{}")
        return float(body.get("at", 0.0)), str(body.get("domain", ""))
    except (ValueError, TypeError, AttributeError):
        return 0.0, ""


def ago(seconds: float) -> str:
    """Return a time span in words: ``40 s``, ``4 min``, ``3 h``, ``5 days``."""
    for size, unit in ((2 * 86400, "days"), (2 * 3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"


def parts(worker: str) -> tuple[str, str]:
    """Return the number and the host of ``gpu0@host``."""
    name, _, its_host = worker.partition("@")
    return name.removeprefix("gpu"), its_host


def command(worker: str, host: str) -> str:
    """Return the command that puts a worker's tasks back, for use on ``host``."""
    number, its_host = parts(worker)
    return f"gpuinfer restore {number if its_host == host and number.isdigit() else f'--name {worker}'}"
