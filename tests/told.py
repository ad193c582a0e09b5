# SPDX-License-Identifier: Apache-2.0
"""For a watcher that is led step by step: units that only remember, and a host without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection

from gpuinfer.settings import Settings
from gpuinfer.watcher.units import UnitView
from tests.services import RedisServer

Build = Callable[..., Settings]


class Told:
    """Units that only remember what they were told to do."""

    def __init__(self, count: int) -> None:
        self.views = dict.fromkeys(range(count), UnitView())
        self.done: list[tuple[str, int]] = []

    async def open(self) -> None: ...

    async def states(self, numbers: Collection[int] = ()) -> dict[int, UnitView]:
        return self.views

    async def act(self, verb: str, number: int) -> None:
        self.done.append((verb, number))
        self.views[number] = UnitView(state="activating" if verb == "start" else "inactive")

    async def close(self) -> None: ...


def cpu(server: RedisServer, build: Build) -> Settings:
    """Return settings for a host without a GPU."""
    return build(server, worker={"device": "cpu"}, watcher={"assumed_rate": 1.0})
