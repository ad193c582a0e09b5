# SPDX-License-Identifier: Apache-2.0
"""The watcher's loop: probe, decide, write down, act. A probe that fails does not end it.

Commands are kept in Redis before they are carried out: a watcher that is killed in between recognises them
afterwards, and does not take them for an administrator's. A dry run beside the service (``--dry-run``) reads
what the service keeps and tells, and writes nothing.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import orjson
import redis
from sdnotify import SystemdNotifier

from gpuinfer import instances
from gpuinfer.alerts.alerting import Alerting, folder_of
from gpuinfer.errors import (
    BrokerError,
    GpuinferError,
    UnitRefused,
    UnitStopping,
    UnitsUnavailable,
    UnusableRedis,
)
from gpuinfer.gpus import Inventory
from gpuinfer.log import get_logger
from gpuinfer.metrics.recorder import Recorder
from gpuinfer.queue import format as layout
from gpuinfer.queue import keys
from gpuinfer.queue.catalogue import described_as
from gpuinfer.queue.connection import connect, explain, typed_errors
from gpuinfer.queue.fleet import Serves
from gpuinfer.queue.scripts import bind, read_all
from gpuinfer.settings import Settings, settings_file
from gpuinfer.watcher import health, notes, served
from gpuinfer.watcher.gpu_watch import Gpus, GpuWatch
from gpuinfer.watcher.lookout import Lookout
from gpuinfer.watcher.memory import adopt, exclusion, refused
from gpuinfer.watcher.policy import Decision, History, decide
from gpuinfer.watcher.probe import DECISIONS, MEMORY_PREFIX, Probe, as_it_runs
from gpuinfer.watcher.reaper import Reaper
from gpuinfer.watcher.served import Served
from gpuinfer.watcher.state import (
    HEALTHY,
    Action,
    GpuHealth,
    Instance,
    Key,
    Observation,
)
from gpuinfer.watcher.stranded import Reporter
from gpuinfer.watcher.systemd_units import SystemdUnits
from gpuinfer.watcher.units import Units, UnitView

log = get_logger(__name__)

Answer = TypeVar("Answer")

#: When Redis does not answer, a probe waits for this many timeouts at most; the watchdog is fed this often.
DEAF_ANSWERS = 10
FEED_S = 10.0
#: Keep the history this often when no command has changed it.
KEEP_EVERY_S = 30.0
#: Tell the fleet this often which models this host could serve.
KNOW_EVERY_S = 60.0
#: Stop again what was started within this many seconds before the watcher is told to stop: all workers may
#: have been told to stop just before, which has no effect on one that did not run yet.
UNDO_S = 2.0


class Watcher:
    """Watches one host's part of the fleet."""

    def __init__(
        self,
        settings: Settings,
        units: Units,
        numbers: tuple[int, ...] = (),
        *,
        act: bool,
        tell: bool = False,
        host: str | None = None,
        environment: served.Environment | None = None,
        folder: Path = instances.FOLDER,
        gpus: Gpus | None = None,
        alerting: Alerting | None = None,
    ) -> None:
        """``numbers``: the instances that this host is known to have, until its GPUs have been listed.

        ``tell``: take part in what watchers tell each other, and keep; who acts does in any case.

        ``environment``: what an instance would be started with; without it, all have these settings.
        ``folder``: where instances' own files are.
        ``gpus``: who tells of the GPUs; without it, NVML does.
        ``alerting``: who tells people of trouble; without it, the journal alone is told.
        """
        self._settings = settings
        self._units = units
        self._act = act
        self._tell = act or bool(tell)
        self.host = host or socket.gethostname()
        self._client = connect(settings.broker)
        self._write = bind(self._client, "keep")
        self._know = bind(self._client, "know")
        self._describe = bind(self._client, "describe")
        self._served = Served(settings, environment)
        self._stranded = Reporter()
        self._not_kept = ""
        self._not_known = ""
        self._known_at = -math.inf
        self._probe = Probe(
            self._client,
            self.host,
            interval_s=settings.watcher.probe_interval_s,
            startup_s=settings.watcher.assumed_startup_s,
            tell=self._tell,
        )
        self._reaper = Reaper(self._client, self.host, settings)
        self._notifier = SystemdNotifier()
        self._recorder = Recorder(self._client, self.host)
        bound = partial(health.bound_by_files, folder)
        self._gpus = gpus or GpuWatch(settings, numbers, bound=bound, on_xid=self._count_xid)
        self._alerting = alerting or Alerting(self.host)
        self._lookout = Lookout(settings, self._client, self.host, self._alerting)
        self._health: Mapping[int, GpuHealth] = {}
        self._xids: dict[int, str] = {}
        self._kept_at = 0.0
        self._said: object = None
        self._refused: dict[Key, str] = {}
        self._rival = ""
        self._unreadable = ""
        self._ready = False
        #: Instance -> when it was told to start, on the monotonic clock.
        self._started: dict[int, float] = {}
        self._stop = asyncio.Event()
        self.history: History | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Probe and act until ``stop`` is set. A probe that fails is logged.

        Once it is set nothing is started or noted any more: the workers may be stopping at the same time, and
        that is no stop by hand. What was started a moment before is stopped. Raises UnusableRedis as soon as
        Redis turns out to have another format.
        """
        self._stop = stop
        await asyncio.to_thread(self._gpus.start)
        try:
            await self._run(stop)
            await self._undo_starts()
        finally:
            await asyncio.to_thread(self._gpus.stop)

    async def _run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self.step()
            except UnusableRedis:
                raise
            except Exception:  # one probe that fails must not end the service
                log.exception("look_failed")
            self._notifier.notify("WATCHDOG=1")
            try:
                await asyncio.wait_for(stop.wait(), self._settings.watcher.probe_interval_s)
            except TimeoutError:
                continue
        self._notifier.notify("STOPPING=1")

    async def step(self) -> Decision | None:
        """Probe, decide, act. Returns the decision; None when systemd cannot be asked, or after ``stop``."""
        try:
            views = await self._units.look(self._gpus.numbers)
        except (UnitsUnavailable, UnitRefused) as exc:
            self._say(("units", str(exc)), "units_away", reason=str(exc))
            return None
        self._look_at_gpus(views)
        now = time.time()
        seen = await self._patiently(self._observe, views, now)
        if self._stop.is_set():
            return None
        decision = decide(seen, self.history or History(), self._settings.watcher, now)
        if self.history is None and seen.queues is None:
            self._report(decision, seen)
            return decision  # what the previous process did is not known yet
        changed = self.history is None or decision.history.units is not self.history.units
        self.history = decision.history
        self._xids = {}  # they are in the history now
        new = self._report(decision, seen)
        self._stranded.report(decision.stranded)
        if self._tell and seen.queues is not None and (changed or new or now - self._kept_at > KEEP_EVERY_S):
            await self._patiently(self._keep, decision, now, new)
        for action in decision.of(self.host) if self._act else ():
            if self._stop.is_set():
                break
            await self._do(action)
        if self._tell:  # also where decisions are only logged: nobody else puts this host's tasks back
            away = seen.queues is None
            await self._patiently(partial(self._reaper.step, away=away), views, seen.live_hosts)
            self._probe.summary = self._summary(decision, now)
            if new:
                self._recorder.count("decision", decision.verdict)
            if not away:
                await self._patiently(self._recorder.step, seen.live_hosts)
            await self._alerting.tell(await self._patiently(self._lookout.look, decision, seen, now), now)
        return decision

    async def _patiently(self, call: Callable[..., Answer], *arguments: object) -> Answer:
        """Run in a thread. Waiting for a Redis that does not answer is no hang of this process."""
        task = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
        limit_s = DEAF_ANSWERS * self._settings.broker.connect_timeout_s
        for _ in range(math.ceil(limit_s / FEED_S)):
            await asyncio.wait({task}, timeout=FEED_S)
            if task.done():
                break
            self._notifier.notify("WATCHDOG=1" if self._ready else f"EXTEND_TIMEOUT_USEC={3e6 * FEED_S:.0f}")
        return await task

    def _summary(self, decision: Decision, now: float) -> Mapping[str, object]:
        """Return what the others, and people, are told of this host's watcher."""
        own = (unit for key, unit in decision.history.units.items() if key.host == self.host)
        told = {"quarantined": sum(unit.quarantine(now) is not None for unit in own), "why": decision.why}
        return told | {name: decision.inputs[name] for name in ("desired",) if name in decision.inputs}

    def _count_xid(self, gpu: int, xid: int) -> None:
        self._recorder.count("xid", f"{gpu}/{xid}")

    def _look_at_gpus(self, views: Mapping[int, UnitView]) -> None:
        ours = {number for number, view in views.items() if view.state not in ("inactive", "failed")}
        self._health = self._gpus.health(ours, views)
        self._xids |= self._gpus.take_xids()

    def _observe(self, views: Mapping[int, UnitView], now: float) -> Observation:
        own = [self._instance(number, view, now) for number, view in sorted(views.items())]
        try:
            self._establish_format()
            if self.history is None or not self._tell:
                self._recall(own)
            figures = (self.history or History()).figures
            told = [self._published(one, now) for one in own]
            seen = self._probe.look(told, now, figures, self._gpus.readings())
            if self._tell and time.monotonic() - self._known_at >= KNOW_EVERY_S and self._make_known(own):
                self._known_at = time.monotonic()
        except BrokerError as exc:
            return Observation(queues=None, instances=tuple(own), host=self.host, trouble=str(exc))
        if seen.rival and seen.rival != self._rival:
            hint = "host names must differ, and each host has one watcher that acts"
            log.error("name_taken", host=self.host, reason="another watcher tells under our name", hint=hint)
        self._rival = seen.rival
        marked = tuple(
            as_it_runs(one, seen.in_flight, seen.beating, seen.missing, seen.drained) for one in own
        )
        everywhere = (*marked, *seen.remote)
        held: Counter[Serves] = Counter()
        for one in everywhere:
            held[one.serves] += seen.in_flight.get(str(one.key), 0) if one.state == "active" else 0
        return Observation(
            queues=seen.queues,
            instances=everywhere,
            held=held,
            host=self.host,
            live_hosts=seen.live_hosts,
            dead_letters=seen.dead_letters,
            figures=seen.figures,
            acts=self._act,
        )

    def _establish_format(self) -> None:
        """Give an empty Redis our format number before anything is written there.

        One that was emptied, or came back empty, knows no model either.
        """
        with typed_errors():
            found: bytes | None = self._client.get(keys.FORMAT_KEY) if self._tell else b""  # type: ignore[assignment]
            if found is not None:
                return
            self._known_at = -math.inf
            # A full Redis is not empty, and the watcher goes on: the number comes with the next epoch.
            with suppress(redis.exceptions.OutOfMemoryError):
                layout.establish(self._client)

    def _recall(self, own: list[Instance]) -> None:
        """Take over what the previous process has kept; in a dry run, what the service remembers now."""
        kept, history = self._kept()
        if self.history is None:
            self.history = replace(history, units=adopt(history.units, own))
        elif kept is not None:
            self.history = replace(self.history, units=history.units)

    def _kept(self) -> tuple[bytes | None, History]:
        """Return what is kept, and as a history; None and an empty one where it cannot be read."""
        try:
            with typed_errors():
                kept: bytes | None = self._client.get(MEMORY_PREFIX + self.host)  # type: ignore[assignment]
            history = notes.unpack(kept, boot_id())
        except (notes.Unreadable, BrokerError) as exc:
            if isinstance(exc, BrokerError) and not isinstance(exc.__cause__, redis.ResponseError):
                raise
            self._say_unreadable(str(exc))
            return None, History()
        self._unreadable = ""
        return kept, history

    def _say_unreadable(self, reason: str) -> None:
        if reason != self._unreadable:
            hint = "what was measured, and who was started or stopped by hand, is learned again"
            log.warning("memory_unreadable", key=MEMORY_PREFIX + self.host, reason=reason, hint=hint)
        self._unreadable = reason

    def _make_known(self, own: list[Instance]) -> bool:
        """Tell the fleet which models this host could serve, those of its instances that are installed, and
        what they take: a request for one that no worker has loaded yet is checked, too."""
        models = self._served.installed(one.key.number for one in own if not one.masked)
        try:
            if models:
                self._know(keys=[], args=[*models])
            described = {name: one for name, one in models.items() if one is not None}
            if described:
                self._describe(keys=[], args=described_as(f"watcher@{self.host}", described))
        except (redis.RedisError, OSError) as exc:  # workers tell it too
            hint = "a model of which no worker has run yet is refused; gpuinfer doctor redis.users"
            if str(exc) != self._not_known:
                log.warning("models_not_made_known", reason=str(explain(exc)), hint=hint)
            self._not_known = str(exc)
            return False
        self._not_known = ""
        return True

    def _instance(self, number: int, view: UnitView, now: float) -> Instance:
        gpu = self._health.get(number, HEALTHY)
        if number in self._xids:
            gpu = replace(gpu, fault=", ".join(filter(None, (gpu.fault, self._xids[number]))))
        return Instance(
            key=Key(number, self.host),
            state=view.state,
            since=now - view.age_s,
            enabled=view.enabled,
            masked=view.masked,
            target_stopped=view.target_stopped,
            queued=view.queued,
            restarts=view.restarts,
            gpu=gpu,
            serves=self._served.serves(number),
        )

    def _published(self, instance: Instance, now: float) -> Instance:
        """Return an instance as the other watchers are told of it, with why it is excluded."""
        unit = (self.history or History()).units.get(instance.key)
        hold = unit.held(now) if unit else ""
        why = None
        if instance.state == "activating":
            why = unit.quarantine(now) if unit else None
        elif instance.state != "active":
            hold = "stopped" if instance.target_stopped else hold
            why = exclusion(instance, unit, self._settings.watcher, now)
        return replace(instance, hold=hold, excluded=str(why or ""), log_only=not self._act)

    async def _undo_starts(self) -> None:
        """Stop what was started a moment ago. ``adopt`` does not take it for a stop by hand."""
        since = time.monotonic() - UNDO_S
        for number in [number for number, at in self._started.items() if at >= since]:
            worker = str(Key(number, self.host))
            try:
                await self._units.act("stop", number)
                log.info("start_undone", worker=worker, why="the watcher was told to stop right after it")
            except (UnitRefused, UnitsUnavailable) as exc:
                log.warning("start_not_undone", worker=worker, reason=str(exc))

    async def _do(self, action: Action) -> None:
        number = action.key.number
        try:
            await self._units.act(action.verb, number)
            self._refused.pop(action.key, None)
        except UnitStopping as exc:
            log.info("start_dropped", worker=str(action.key), reason=str(exc))
            return
        except (UnitRefused, UnitsUnavailable) as exc:
            if self._refused.get(action.key) != str(exc):
                log.error("action_failed", verb=action.verb, worker=str(action.key), reason=str(exc))
            self._refused[action.key] = str(exc)
            if isinstance(exc, UnitRefused) and action.verb != "stop" and self.history is not None:
                units = refused(self.history.units, action.key, str(exc), self._settings.watcher, time.time())
                self.history = replace(self.history, units=units)
                self._kept_at = 0.0
            if isinstance(exc, UnitRefused):
                return
        if action.verb == "start":
            self._started[number] = time.monotonic()
        else:
            self._started.pop(number, None)

    # -- telling --------------------------------------------------------------------------

    def _keep(self, decision: Decision, now: float, new: bool) -> None:
        """Keep the history, and a new decision. Without Redis, they are in memory alone."""
        self._kept_at = now
        entry = b""
        if new:
            entry = orjson.dumps(notes.note(decision, self.host, now, done=self._act))
        try:
            memory = notes.pack(decision.history, boot_id())
            self._write(keys=[MEMORY_PREFIX + self.host, DECISIONS], args=[memory, entry, notes.KEPT])
        except (redis.RedisError, OSError) as exc:
            reason = str(explain(exc))
            if reason != self._not_kept:  # once: a full disk refuses it at each probe
                log.warning("notes_not_kept", reason=reason)
            self._not_kept = reason
        else:
            self._not_kept = ""

    def _report(self, decision: Decision, seen: Observation) -> bool:
        """Log a decision once: each change of the fleet, each new reason to hold. Tell if it is new.

        How many are missing changes at each probe; that some are is one reason.
        """
        names = ", ".join(f"{action.verb} {action.key}" for action in decision.of(self.host))
        running = sum(one.runs for one in seen.instances if seen.owns(one.key))
        verdict = decision.verdict if names else "hold"
        excluded = frozenset((key, why.reason) for key, why in decision.excluded.items())
        topic = (verdict, names, running, _step(decision.inputs), excluded, seen.queues is None)
        more = {"actions": names, "done": self._act} if names else {}
        new = self._say(topic, verdict, why=decision.why, **more, **decision.inputs)
        waiting = "Redis is away" if seen.queues is None else f"{seen.waiting:,} waiting"
        if self._rival:
            waiting = f"another watcher is called {self.host}, too; {waiting}"
        count = f"{running} of {sum(seen.owns(one.key) for one in seen.instances)} workers of this host run"
        self._notifier.notify(f"STATUS={waiting}, {count}: {decision.why}")
        if not self._ready:
            self._notifier.notify("READY=1")
            self._ready = True
        return new

    def _say(self, topic: object, action: str, **fields: object) -> bool:
        if topic == self._said:
            return False
        self._said = topic
        log.info(action, **fields)
        return True


def _step(inputs: Mapping[str, object]) -> object:
    """Return how many of the instances are desired, and whether more are than there are."""
    desired, possible = inputs.get("desired"), inputs.get("possible")
    if not isinstance(desired, int) or not isinstance(possible, int):
        return None
    return min(desired, possible), desired > possible


@cache
def boot_id() -> str:
    """Return what changes with each boot of the host; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as exc:
        log.warning("boot_unknown", reason=str(exc), hint="what was stopped by hand is held over a boot, too")
        return ""


def make_units(settings: Settings, *, act: bool) -> Units:
    """Return the back end that the settings name. ``act``: False for one that only looks."""
    if settings.watcher.backend == "process":
        from gpuinfer.watcher.process_units import ProcessUnits

        return ProcessUnits(special=served.beside_settings)
    return SystemdUnits(acts=act)


async def serve(settings: Settings, *, dry_run: bool) -> None:
    """Run until SIGTERM or SIGINT. A dry run leaves no trace, and may run beside the service."""
    read_all()
    act = not dry_run and settings.watcher.decisions == "act"
    units = make_units(settings, act=act)
    process = settings.watcher.backend == "process"
    environment = served.of_processes if process else served.of_units
    folder = settings_file().parent if process else instances.FOLDER
    # Which GPUs there are is not known until NVML has answered, which may take long.
    fixed = settings.watcher.instances or settings.worker.device == "cpu"
    numbers = health.instance_numbers(settings, Inventory()) if fixed else ()
    watcher = Watcher(
        settings,
        units,
        numbers,
        act=act,
        tell=not dry_run,
        environment=environment,
        folder=folder,
        alerting=Alerting(
            socket.gethostname(),
            start=units.alert if isinstance(units, SystemdUnits) else None,
            state=folder_of("STATE_DIRECTORY"),
            run=folder_of("RUNTIME_DIRECTORY"),
        ),
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log.info("watching", host=watcher.host, mode=settings.watcher.mode, acts=act)
    try:
        await units.open()
    except GpuinferError as exc:
        log.error("units_away", reason=str(exc), hint="trying again at each probe")
    try:
        await watcher.run(stop)
    finally:
        await units.close()
        log.info("stopped", host=watcher.host)
