# SPDX-License-Identifier: Apache-2.0
"""The watcher's loop: probe, decide, keep, act. A probe that fails does not end it.

    units, GPUs (this host) ─┐
    Probe (Redis, others) ───┴─► Observation ─► policy.decide ─► Decision ─┬► Report: journal, STATUS=
                                                                           ├► Keeper: Redis
                                                                           └► Commands: systemd

Commands are recorded in Redis before they are carried out: a watcher that is killed in between recognises
them afterwards, and does not take them for an administrator's. A dry run beside the service (``--dry-run``)
reads what the service has recorded, and writes nothing.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import redis
from sdnotify import SystemdNotifier

from gpuinfer import instances
from gpuinfer.alerts.alerting import Alerting, folder_of
from gpuinfer.errors import BrokerError, GpuinferError, UnitRefused, UnitsUnavailable, UnusableRedis
from gpuinfer.gpus import Inventory
from gpuinfer.log import get_logger
from gpuinfer.metrics.recorder import Recorder
from gpuinfer.queue import format as layout
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect, typed_errors
from gpuinfer.queue.scripts import read_all
from gpuinfer.settings import Settings, settings_file
from gpuinfer.watcher import health, served
from gpuinfer.watcher.gpu_watch import Gpus, GpuWatch
from gpuinfer.watcher.memory import adopt, exclusion, refused, undone
from gpuinfer.watcher.notes import Keeper
from gpuinfer.watcher.policy import Decision, History, decide
from gpuinfer.watcher.probe import Probe
from gpuinfer.watcher.process_units import ProcessUnits
from gpuinfer.watcher.reaper import Reaper
from gpuinfer.watcher.report import Report
from gpuinfer.watcher.served import Announcer, Served
from gpuinfer.watcher.state import HEALTHY, Action, GpuHealth, Instance, Key, Observation
from gpuinfer.watcher.systemd_units import SystemdUnits
from gpuinfer.watcher.troubles import Troubles
from gpuinfer.watcher.units import Commands, Units, UnitView

log = get_logger(__name__)

Answer = TypeVar("Answer")

#: A probe waits for Redis for this many timeouts at most, and feeds the watchdog this often meanwhile.
DEAF_ANSWERS = 10
FEED_S = 10.0


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
        """``numbers``: the instances of this host until its GPUs are listed.

        ``tell``: publish this host's state, and record the history in Redis; ``act`` implies it.
        ``environment``: the variables that an instance is started with; without it, all have ``settings``.
        ``folder``: where instances' own files are.
        ``gpus``: the observer of GPUs; NVML unless given.
        ``alerting``: reports troubles; to the journal only unless given.
        """
        self._settings = settings
        self._units = units
        self._act = act
        self._tell = act or bool(tell)
        self.host = host or socket.gethostname()
        self._client = connect(settings.broker)
        self._served = Served(settings, environment)
        self._keeper = Keeper(self._client, self.host)
        self._announcer = Announcer(self._client, self.host, self._served)
        self._probe = Probe(
            self._client,
            self.host,
            interval_s=settings.watcher.probe_interval_s,
            startup_s=settings.watcher.assumed_startup_s,
            tell=self._tell,
        )
        self._reaper = Reaper(self._client, self.host, settings)
        self._commands = Commands(units)
        self._notifier = SystemdNotifier()
        self._report = Report(self.host, self._notifier, acts=act)
        self._recorder = Recorder(self._client, self.host)
        bound = partial(health.bound_by_files, folder)
        self._gpus = gpus or GpuWatch(settings, numbers, bound=bound, on_xid=self._count_xid)
        self._alerting = alerting or Alerting(self.host)
        self._troubles = Troubles(settings, self._client, self.host, self._alerting)
        self._health: Mapping[int, GpuHealth] = {}
        self._xids: dict[int, str] = {}
        self._stop = asyncio.Event()
        self.history: History | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Probe and act until ``stop`` is set. A probe that fails is logged.

        After that nothing is started or recorded: the workers may be stopping at the same time, which must
        not count as a stop by hand. Workers that were started a moment before are stopped again. Raises
        UnusableRedis as soon as Redis turns out to have another format.
        """
        self._stop = stop
        await asyncio.to_thread(self._gpus.start)
        try:
            await self._run(stop)
            await self._undo()
        finally:
            await asyncio.to_thread(self._gpus.stop)

    async def _run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self.step()
            except UnusableRedis:
                raise
            except Exception:  # one probe that fails must not end the service
                log.exception("probe_failed")
            self._notifier.notify("WATCHDOG=1")
            try:
                await asyncio.wait_for(stop.wait(), self._settings.watcher.probe_interval_s)
            except TimeoutError:
                continue
        self._notifier.notify("STOPPING=1")

    async def _undo(self) -> None:
        """Stop what was started a moment ago; record it, so that it is not taken for a stop by hand.

        The stop does not wait for Redis.
        """
        started = self._commands.recent()
        if not started or self.history is None:
            return
        now = time.time()
        history = replace(self.history, units=undone(self.history.units, started, now))
        kept = asyncio.create_task(self._patiently(self._keeper.keep_history, history, now))
        await self._commands.undo(started)
        await kept

    async def step(self) -> Decision | None:
        """Probe, decide, act. Returns the decision; None when systemd cannot be asked, or after ``stop``."""
        try:
            views = await self._units.states(self._gpus.numbers)
        except (UnitsUnavailable, UnitRefused) as exc:
            self._report.trouble(("units", str(exc)), "units_away", reason=str(exc))
            return None
        self._check_gpus(views)
        now = time.time()
        seen = await self._patiently(self._observe, views, now)
        if self._stop.is_set():
            return None
        decision = decide(seen, self.history or History(), self._settings.watcher, now)
        if self.history is None and seen.queues is None:
            self._report.decision(decision, seen)
            return decision  # what the previous process did is not known yet
        changed = self.history is None or decision.history.units is not self.history.units
        self.history = decision.history
        self._xids = {}  # the history has them now
        new = self._report.decision(decision, seen)
        if self._tell and seen.queues is not None and (changed or new or self._keeper.due(now)):
            keep = partial(self._keeper.keep, new=new, done=self._act)
            await self._patiently(keep, decision, now)
        for action in decision.of(self.host) if self._act else ():
            if self._stop.is_set():
                break
            why = await self._commands.do(action)
            if why:
                self._note_refusal(action, why)
        if self._tell:  # even if decisions are only logged: no other watcher puts this host's tasks back
            away = seen.queues is None
            await self._patiently(partial(self._reaper.step, away=away), views, seen.live_hosts)
            self._probe.summary = self._summary(decision, now)
            if new:
                self._recorder.count("decision", decision.verdict)
            if not away:
                await self._patiently(self._recorder.step, seen.live_hosts)
            await self._alerting.tell(await self._patiently(self._troubles.find, decision, seen, now), now)
        return decision

    async def _patiently(self, call: Callable[..., Answer], *arguments: object) -> Answer:
        """Run a blocking call in a thread. A Redis that does not answer is not a hang of this process."""
        task = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
        limit_s = DEAF_ANSWERS * self._settings.broker.connect_timeout_s
        for _ in range(math.ceil(limit_s / FEED_S)):
            await asyncio.wait({task}, timeout=FEED_S)
            if task.done():
                break
            self._notifier.notify(
                "WATCHDOG=1" if self._report.ready else f"EXTEND_TIMEOUT_USEC={3e6 * FEED_S:.0f}"
            )
        return await task

    def _summary(self, decision: Decision, now: float) -> Mapping[str, object]:
        """Return what other watchers and people are told of this one."""
        own = (unit for key, unit in decision.history.units.items() if key.host == self.host)
        told = {"quarantined": sum(unit.quarantine(now) is not None for unit in own), "why": decision.why}
        return told | {name: decision.inputs[name] for name in ("desired",) if name in decision.inputs}

    def _count_xid(self, gpu: int, xid: int) -> None:
        self._recorder.count("xid", f"{gpu}/{xid}")

    def _check_gpus(self, views: Mapping[int, UnitView]) -> None:
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
            seen = self._probe.observe(own, now, figures, self._gpus.readings(), told=told)
            if self._tell:
                self._announcer.step(own)
        except BrokerError as exc:
            return Observation(queues=None, instances=tuple(own), host=self.host, trouble=str(exc))
        self._report.rival(seen.rival)
        return replace(seen, acts=self._act)

    def _establish_format(self) -> None:
        """Write our format number to an empty Redis before anything else.

        An empty Redis has lost the catalogue of models too, so they are announced again.
        """
        with typed_errors():
            found: bytes | None = self._client.get(keys.FORMAT_KEY) if self._tell else b""  # type: ignore[assignment]
            if found is not None:
                return
            self._announcer.again()
            # A full Redis is not empty: the next epoch writes the number.
            with suppress(redis.exceptions.OutOfMemoryError):
                layout.establish(self._client)

    def _recall(self, own: list[Instance]) -> None:
        """Take over the history that the previous process recorded; in a dry run, the service's own."""
        kept = self._keeper.read()
        if self.history is None:
            history = kept or History()
            self.history = replace(history, units=adopt(history.units, own))
        elif kept is not None:
            self.history = replace(self.history, units=kept.units)

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
            ready_at=0.0 if view.ready_age_s is None else now - view.ready_age_s,
            gpu=gpu,
            serves=self._served.serves(number),
        )

    def _published(self, instance: Instance, now: float) -> Instance:
        """Return an instance as it is published to the other watchers, with why it is excluded."""
        unit = (self.history or History()).units.get(instance.key)
        hold = unit.held(now) if unit else ""
        why = None
        if instance.state == "activating":
            why = unit.quarantine(now) if unit else None
        elif instance.state != "active":
            hold = "stopped" if instance.target_stopped else hold
            why = exclusion(instance, unit, self._settings.watcher, now)
        return replace(instance, hold=hold, excluded=str(why or ""), log_only=not self._act)

    def _note_refusal(self, action: Action, why: str) -> None:
        """Remember that an instance cannot be started, so that another one is tried."""
        history = self.history or History()
        units = refused(history.units, action.key, why, self._settings.watcher, time.time())
        self.history = replace(history, units=units)
        self._keeper.outdated()


def make_units(settings: Settings, *, act: bool) -> Units:
    """Return the back end that the settings name. ``act``: False for one that only reads."""
    if settings.watcher.backend == "process":
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
