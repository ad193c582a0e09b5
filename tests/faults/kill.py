# SPDX-License-Identifier: Apache-2.0
"""Kill workers while producers go on, then account for every id.

By hand: ``python -m tests.faults.kill --minutes 10``.

Three workers that serve different models, each killed at a random moment, some two at once. Some start
again under their names, as units would; of others the name never comes back, and what lay under it is put
back for it. Our client and plain Celery send work into all queues and priorities meanwhile, some of it with
an ETA, some compressed, some in chains; and bombs: no worker survives reading or running one. In the end all
must drain; then each accepted id is looked up, and the workers' logs tell which ran twice.

Two deaths give a task up, as by default. A worker is never killed here while a task runs, or is read, that
has a death on its account already: it would be given up, as nobody can tell that it had no share in it.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from gpuinfer.errors import BrokerUnavailable
from tests.faults.account import Account, Sent, show
from tests.faults.fleet import BOMBS, Fleet
from tests.faults.stock_world import StockWorld
from tests.services import RedisServer

#: How often the name of a worker that is killed never comes back.
GONE = 0.35
#: How often a worker is killed again while it starts, and puts back what lay under its name.
KILLED_AGAIN = 0.15
#: Kills of stock Celery between two looks for a loss, which take ten seconds.
LOOK_EVERY = 5
#: Seconds between two submissions while a worker starts, which takes all the cores it gets.
PAUSE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do: how many kills, or for how long, by which signal, to whom."""

    signal: str = "KILL"
    kills: int | None = 26
    seconds: float | None = None
    #: How long the default model's only worker is away, once: others pass on what is for them. 0: never.
    absence_s: float = 0.0
    #: The kinds of bombs that are sent, evenly over the kills.
    bombs: Sequence[str] = ()
    #: Kill stock Celery's workers instead, and stop at the first loss.
    stock: bool = False
    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(10**6))


class World(Protocol):
    """What is killed: ours or stock Celery. Each slot has a worker."""

    slots: int

    @property
    def producers(self) -> Sequence[Callable[[random.Random], list[Sent]]]: ...
    def spawn(self, slot: int) -> None: ...
    def ready(self, slot: int) -> None: ...
    def kill(self, slot: int, number: signal.Signals, *, returns: bool = True) -> bool: ...
    def tend(self) -> None: ...
    def give_back(self) -> None: ...
    def bomb(self, kind: str) -> Sent | None: ...
    def finish(self) -> None: ...
    def account(self, sent: Sequence[Sent]) -> Account: ...
    def close(self) -> None: ...


def run(plan: Plan, redis: RedisServer, folder: Path, say: Callable[[str], None] = print) -> Account:
    """Carry the plan out and return the account."""
    say(f"seed {plan.seed}")
    world: World = StockWorld(redis, folder) if plan.stock else Fleet(redis, folder)
    try:
        storm = Storm(plan, world, say)
        storm.blow()
        world.finish()
        return replace(world.account(storm.accepted), kills=storm.kills)
    finally:
        world.close()


class Storm:
    """Kills, one after another or two at once, while producers go on."""

    def __init__(self, plan: Plan, world: World, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._world = world
        self._say = say
        self._dice = random.Random(plan.seed)  # noqa: S311  # moments to kill at, not secrets
        self._signal = signal.Signals[f"SIG{plan.signal}"]
        self._over, self._starting = threading.Event(), threading.Event()
        self._errors: list[BaseException] = []
        self.accepted: list[Sent] = []
        self.kills = 0

    def blow(self) -> None:
        """Carry the plan out; in the end every worker runs, and nothing lies under a name that is gone."""
        everyone = range(self._world.slots)
        for slot in everyone:
            self._world.spawn(slot)
        for slot in everyone:
            self._world.ready(slot)
        producers = [threading.Thread(target=self._produce, args=(call,)) for call in self._world.producers]
        for producer in producers:
            producer.start()
        try:
            self._kill_on()
        finally:
            self._over.set()
            for producer in producers:
                producer.join(timeout=60)
        self._world.give_back()
        if self._errors:
            raise self._errors[0]

    def _kill_on(self) -> None:
        plan, began, told, looked = self._plan, time.monotonic(), 0, 0
        sent, away = 0, False
        while not self._errors:
            progress = self._progress(time.monotonic() - began)
            if progress >= 1:
                return
            if isinstance(self._world, StockWorld) and self.kills - looked >= LOOK_EVERY:
                looked = self.kills
                if self._world.lost_some(self.accepted):
                    return
            for kind in plan.bombs[sent : 1 + int(progress * len(plan.bombs))]:
                self.accepted += filter(None, [self._world.bomb(kind)])
                sent += 1
            absent = progress >= 0.5 and not away and plan.absence_s > 0
            away = away or absent
            self._kill_some(plan.absence_s if absent else 0.0)
            if self.kills // 10 > told:
                told = self.kills // 10
                self._say(f"{self.kills} kills, {len(self.accepted):,} tasks accepted")

    def _progress(self, seconds: float) -> float:
        """Return which part of the plan is done: 1 for all of it."""
        plan = self._plan
        by_kills = 0.0 if plan.kills is None else self.kills / plan.kills
        return max(by_kills, 0.0 if plan.seconds is None else seconds / plan.seconds)

    def _kill_some(self, absence_s: float) -> None:
        """Kill one worker or two, and start others in their places; or the first, which stays away."""
        dice, world = self._dice, self._world
        world.tend()
        victims = [0] if absence_s else dice.sample(range(world.slots), dice.choice((1, 1, 2)))
        time.sleep(dice.uniform(0.02, 0.3))
        for slot in victims:
            self.kills += world.kill(slot, self._signal, returns=dice.random() >= GONE)
        time.sleep(absence_s)
        early = dice.random() < 0.5
        if early:
            world.give_back()
        self._starting.set()
        for slot in victims:
            world.spawn(slot)
        if self._plan.signal == "KILL" and dice.random() < KILLED_AGAIN:
            time.sleep(dice.uniform(0.5, 3.0))
            self.kills += world.kill(victims[0], self._signal)
            world.spawn(victims[0])
        for slot in victims:
            world.ready(slot)
        self._starting.clear()
        if not early:
            world.give_back()

    def _produce(self, call: Callable[[random.Random], list[Sent]]) -> None:
        dice = random.Random(f"{self._plan.seed} {call.__name__}")  # noqa: S311  # no secret
        try:
            while not self._over.is_set():
                try:
                    self.accepted += call(dice)
                except BrokerUnavailable:
                    time.sleep(0.1)
                if self._starting.is_set():
                    self._over.wait(PAUSE_S)
        except BaseException as exc:
            self._errors.append(exc)
            raise


def main() -> int:
    """Run a plan from the command line and print the account; exit 1 when something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="how long (default: 26 kills)")
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument(
        "--stock", action="store_true", help="kill stock Celery instead, until it has lost a task"
    )
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    seconds = options.minutes * 60 if options.minutes else None
    plan = Plan(
        signal=options.signal,
        kills=None if seconds else 26,
        seconds=seconds,
        absence_s=0.0 if options.stock else 14.0,
        bombs=BOMBS * 2 if options.signal == "KILL" and not options.stock else (),
        stock=options.stock,
    )
    if options.seed is not None:
        plan = replace(plan, seed=options.seed)
    redis = RedisServer()
    try:
        with tempfile.TemporaryDirectory(prefix="gi-kill-") as folder:
            account = run(plan, redis, Path(folder))
    finally:
        redis.close()
    show(account, Console(width=None if sys.stdout.isatty() else 110))
    return 0 if account.good else 1


if __name__ == "__main__":
    sys.exit(main())
