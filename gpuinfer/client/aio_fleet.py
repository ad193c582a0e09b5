# SPDX-License-Identifier: Apache-2.0
"""The asyncio client's access to the fleet: its models, queues, workers, and usage by callers."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any

from gpuinfer.client.driver import Driver
from gpuinfer.client.pipe import Pipe
from gpuinfer.client.steps import SCRIPTS, Ask, Script, Steps, T, arun
from gpuinfer.models.signature import Signature
from gpuinfer.queue import catalogue, depth, heartbeats, keys, quota, readiness, usage
from gpuinfer.queue import format as layout
from gpuinfer.queue.connection import connect_async
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.options import Options
from gpuinfer.settings import Settings


class AsyncFleet(Driver):
    """The connection of ``AsyncClient``, and its methods that do not concern single tasks."""

    def __init__(self, source: Settings | str | None = None) -> None:
        super().__init__(source)
        self._redis = connect_async(self._settings.broker)
        options = self._redis.connection_pool.connection_kwargs
        self._pipe = Pipe(self._redis, options["socket_timeout"])
        self._scripts = {name: self._pipe.script(name) for name in SCRIPTS}
        self._account = self._pipe.script("account")

    def _ask(self, ask: Ask) -> Awaitable[Any]:
        """Ask Redis one thing. Raises redis-py's errors."""
        if isinstance(ask, Script):
            return self._scripts[ask.name](ask.keys, ask.args)
        return self._pipe.call(*ask)

    async def _run(self, steps: Steps[T]) -> T:
        return await arun(steps, self._ask, self._errors)

    async def fleet(self) -> catalogue.Fleet:
        """Return the models that the fleet knows, their workers, and the waiting tasks.

        Raises BrokerUnavailable.
        """
        with self._errors:
            return await catalogue.aread(self._redis)

    def known_model(self, options: Options) -> str:
        """Return the model that a request is for, the default where it names none; empty: not known."""
        model = self._model_of(options) or ""
        return model if model == self._default.name or self._signatures.of(model) is not None else ""

    async def takes(self, model: str, *, fresh: bool = True) -> Signature | None:
        """Return what a model takes, with an example if one is known; None if no worker has published it.

        With ``fresh=False`` the answer may be up to half a minute old. Raises BrokerUnavailable.
        """
        if fresh or self._signatures.stale(model) or self._signatures.of(model) is None:
            await self._run(self._ask_signature(model))
        return self._signatures.of(model)

    async def ping(self) -> None:
        """Check Redis. Raises BrokerUnavailable if it does not answer, UnusableRedis for another format."""
        with self._errors:
            layout.check(await self._pipe.call("GET", keys.FORMAT_KEY))

    async def queues(self) -> depth.Depth:
        """Return counts of waiting and in-flight tasks, and the paused queues. Raises BrokerUnavailable."""
        with self._errors:
            return await depth.aread(self._redis)

    async def workers(self) -> list[dict[str, Any]]:
        """Return the contents of each worker's last heartbeat. Raises BrokerUnavailable."""
        with self._errors:
            return heartbeats.shown(*await heartbeats.aread(self._redis))

    async def capacity(self) -> readiness.Capacity:
        """Return the workers that serve now, and the instances that a running watcher may start.

        Raises BrokerUnavailable.
        """
        with self._errors:
            return await readiness.aread(self._redis)

    async def claimed(self) -> int:
        """Return the number of tasks ever claimed from the queues. Raises BrokerUnavailable."""
        with self._errors:
            counts: Any = await self._pipe.call("HGETALL", keys.CLAIMED)
        values = counts.values() if isinstance(counts, dict) else counts[1::2]  # RESP3, or RESP2
        return sum(map(int, values))

    async def usage(self, since_s: float = usage.USUAL_S) -> usage.Usage:
        """Return the usage by callers, in all hours that the last ``since_s`` seconds are part of.

        Raises BrokerUnavailable.
        """
        with self._errors:
            return await usage.aread(self._redis, since_s)

    async def account(self, counts: list[Argument]) -> None:
        """Add the counts of a process (``tally.Tally.args``). Raises BrokerError."""
        with self._errors:
            await self._account([], counts)

    async def weigh(self, weights: Mapping[str, float]) -> None:
        """Set the weights of callers that take turns (the default is 1); delete those of other callers.

        Raises BrokerError.
        """
        with self._errors:
            found = await self._pipe.call("HKEYS", keys.WEIGHTS)
            for command in quota.weighing(weights, found):
                await self._pipe.call(*command)
