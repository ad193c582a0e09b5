# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer demo --fleet``: two simulated hosts with four GPUs each, three models, a mixed load, and faults.

Redis, queue, watchers and results are real; a worker is a thread that sleeps instead of computing. Nothing
on this host is read or changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis

from gpuinfer.demo.fleet_hosts import FleetHost
from gpuinfer.demo.fleet_load import FleetLoad
from gpuinfer.demo.private import CONFIG, START_TIMEOUT_S, Private, Report, cleaning_up, private_folder
from gpuinfer.queue import keys
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.purge import set_paused
from gpuinfer.settings import Loaded, load

#: Host -> instance -> its models.
HOSTS: Mapping[str, Mapping[int, Sequence[str]]] = {
    "gpu-a": {0: ("resnet", "embed"), 1: ("resnet", "embed"), 2: ("whisper",), 3: ("embed", "resnet")},
    "gpu-b": {0: ("resnet", "embed"), 1: ("resnet", "embed"), 2: ("whisper",), 3: ("embed", "resnet")},
}
#: Seconds from the start to each fault.
_FAULTS_S = (4.0, 8.0, 12.0)
_PAUSED = "batch.resnet"


class Fleet(Private):
    """The processes and threads of a simulated fleet. Create it with ``fleet``."""

    #: As on an installed appliance, so that the only warnings are those of the faults.
    redis_options: Mapping[str, str] = {
        **Private.redis_options,
        "appendonly": "yes",
        "maxmemory": "256mb",
        "maxmemory-policy": "volatile-ttl",
    }

    def __init__(self, folder: Path, report: Report, *, seed: int = 1, scale: float = 1.0) -> None:
        settings = {"watcher": {"floor": 2, "cooldown_s": 20, "cooldown_max_s": 60, "probe_interval_s": 0.5}}
        super().__init__(folder, {**settings, "worker": {"device": "cpu"}}, report)
        self.loaded: Loaded = load(folder / CONFIG, {})
        self.hosts = [FleetHost(self.loaded.settings, name, serves) for name, serves in HOSTS.items()]
        self.driver = FleetLoad(self.loaded.settings, seed=seed, scale=scale)
        self._began = 0.0
        self._faults: list[Callable[[], object]] = []

    def start(self) -> None:
        """Start Redis and the hosts. Raises ConfigError, ProcessEnded."""
        self._start_redis(time.monotonic() + START_TIMEOUT_S)
        for host in self.hosts:
            host.start()
        self._began = time.monotonic()
        self._faults = [self.kill, self.lose_gpu, self.pause]

    def await_models(self, client: redis.Redis, until: float) -> None:
        """Wait until the catalogue has all models. Raises ProcessEnded at the time ``until``."""
        wanted = {model for serves in HOSTS.values() for models in serves.values() for model in models}
        while not wanted <= {name.decode() for name in client.zrange(keys.CATALOGUE, 0, -1)}:  # type: ignore[union-attr]
            self._pause([], until, "models")

    def step(self) -> None:
        """Cause the faults that are due."""
        elapsed = time.monotonic() - self._began
        while self._faults and elapsed >= _FAULTS_S[len(_FAULTS_S) - len(self._faults)]:
            self._faults.pop(0)()

    # -- faults ---------------------------------------------------------------------------

    def kill(self) -> None:
        """Submit a task that kills its workers and ends as a dead letter."""
        self.driver.send("realtime", "resnet", fault="kill")

    def lose_gpu(self) -> None:
        """Lose a GPU, as when it falls off the PCI bus."""
        host = self.hosts[-1]
        host.gpus.xids[3] = "Xid 79"
        host.gpus.faults[3] = "GPU is lost"
        host.workers[3].stop()

    def pause(self) -> None:
        """Pause a queue."""
        with self.client() as client:
            set_paused(client, _PAUSED, True)

    def resume(self) -> None:
        """Resume the queue."""
        with self.client() as client:
            set_paused(client, _PAUSED, False)

    # -- the end --------------------------------------------------------------------------

    def client(self) -> redis.Redis:
        """Return a client of its Redis."""
        from gpuinfer.queue.connection import connect

        return connect(self.loaded.settings.broker)

    def drain(self, timeout_s: float) -> bool:
        """Stop the load and wait for all accepted tasks to end; return whether they did in time."""
        self.driver.stop()
        self.resume()
        until = time.monotonic() + timeout_s
        with self.client() as client:
            while time.monotonic() < until:
                depth = read_depth(client)
                if not depth.total_waiting and not depth.total_inflight:
                    return True
                time.sleep(0.1)
        return False

    def close(self) -> None:
        """Stop the load, the watchers, the workers and Redis."""
        self.driver.stop()
        for host in self.hosts:
            host.stop()
        super().close()


@contextmanager
def fleet(report: Report = lambda *_: None, *, seed: int = 1, scale: float = 1.0) -> Iterator[Fleet]:
    """Yield a fleet that is not started yet; clean up at the end."""
    made = Fleet(private_folder("gpuinfer-fleet-"), report, seed=seed, scale=scale)
    with cleaning_up(made):
        yield made
