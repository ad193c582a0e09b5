# SPDX-License-Identifier: Apache-2.0
"""The mixed load of a simulated fleet, and counts of the submitted tasks by expected outcome."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from gpuinfer.client import Client
from gpuinfer.demo.fleet_workers import FAULT
from gpuinfer.errors import BrokerError
from gpuinfer.settings import Settings

#: Seconds between two checks of what to submit.
_STEP_S = 0.05
#: One in this many tasks fails.
_FAILS = 200


@dataclass(frozen=True)
class Stream:
    """One kind of work."""

    tier: str
    model: str
    #: Average tasks per second, and tasks per burst.
    rate: float
    burst: int = 1


#: A load that eight workers can handle, with an occasional backlog.
STREAMS = (
    Stream("realtime", "resnet", 120.0),
    Stream("default", "embed", 60.0, 4),
    Stream("batch", "whisper", 12.0, 60),
    Stream("batch", "resnet", 40.0, 200),
)


class FleetLoad:
    """Submits tasks until stopped. ``submitted`` is exact after that."""

    def __init__(self, settings: Settings, *, seed: int = 1, scale: float = 1.0) -> None:
        self._settings = settings
        self._random = Random(seed)  # noqa: S311  a load, not a secret
        self._scale = scale
        self._stop = threading.Event()
        self._lock = threading.Lock()
        #: (tier, model, expected outcome) -> tasks that Redis has accepted.
        self.submitted: Counter[tuple[str, str, str]] = Counter()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; every submission is counted then."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def send(self, tier: str, model: str, count: int = 1, *, fault: str = "") -> list[str]:
        """Submit tasks and count them; return their ids. Raises BrokerError."""
        with Client(self._settings) as client:
            return self._send(client, tier, model, count, fault)

    def _send(self, client: Client, tier: str, model: str, count: int, fault: str) -> list[str]:
        options: dict[str, Any] = {"model": model, "queue": tier}
        if fault:
            options["metadata"] = {FAULT: fault}
        outcome = {"fail": "failed", "kill": "dead"}.get(fault, "completed")
        try:
            ids = client.submit_many([[1.0]] * count, **options)
        except BrokerError as exc:
            self._note(tier, model, outcome, len(getattr(exc, "accepted", ())))
            raise
        self._note(tier, model, outcome, len(ids))
        return ids

    def _note(self, tier: str, model: str, outcome: str, count: int) -> None:
        with self._lock:
            self.submitted[tier, model, outcome] += count

    def _run(self) -> None:
        due = dict.fromkeys(STREAMS, 0.0)
        before = time.monotonic()
        with Client(self._settings) as client:
            while not self._stop.wait(_STEP_S):
                now = time.monotonic()
                for stream in STREAMS:
                    share = self._random.uniform(0.5, 1.5)
                    due[stream] += stream.rate * self._scale * (now - before) * share
                    count = int(due[stream] // stream.burst) * stream.burst
                    due[stream] -= count
                    self._burst(client, stream, count)
                before = now

    def _burst(self, client: Client, stream: Stream, count: int) -> None:
        ill = sum(self._random.randrange(_FAILS) == 0 for _ in range(count))
        try:
            for some, fault in ((count - ill, ""), (ill, "fail")):
                if some:
                    self._send(client, stream.tier, stream.model, some, fault)
        except BrokerError:
            self._stop.wait(1.0)  # Redis is unavailable, and the status screen shows it

    def to_dict(self) -> Mapping[str, Mapping[str, int]]:
        """Return ``tier.model`` -> outcome -> tasks."""
        found: dict[str, dict[str, int]] = {}
        with self._lock:
            for (tier, model, outcome), count in sorted(self.submitted.items()):
                found.setdefault(f"{tier}.{model}", {})[outcome] = count
        return found
