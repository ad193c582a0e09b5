# SPDX-License-Identifier: Apache-2.0
"""Worker units over D-Bus. systemd signals what has changed, and only that is read again.

Interface: org.freedesktop.systemd1(5). polkit decides what an unprivileged watcher may do; see
systemd/50-gpuinfer-watcher.rules.

systemd counts every start of a unit against its StartLimitBurst=, whether ours or an administrator's, and
refuses the next one ("attempted too often"). That limit is meant for crash loops, so the count is reset
before each start of ours, once a worker is ready after a start that was no automatic restart, and after a
crash loop has ended. After that last reset systemd calls the unit inactive; here it stays failed until it is
started again.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dbus_fast import BusType, Message, MessageType
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusError

from gpuinfer.errors import UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.log import get_logger
from gpuinfer.watcher.state import UnitState, Verb
from gpuinfer.watcher.units import UnitView

log = get_logger(__name__)

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"
PROPERTIES = "org.freedesktop.DBus.Properties"
ROOT = "/org/freedesktop/systemd1"
#: Everything is read again this often, in case a signal was missed.
RESYNC_S = 60.0
CALL_TIMEOUT_S = 10.0
#: Reset systemd's count after this many failed starts, well before its limit of 10.
FAILED_STARTS = 5
#: Method and job mode. A start never cancels a stop that is queued or under way ("fail"): an administrator
#: may have asked for it.
_METHODS: Mapping[Verb, tuple[str, str]] = {"start": ("StartUnit", "fail"), "stop": ("StopUnit", "replace")}
#: systemd's error for a start that would cancel a stop.
_STOPPING = "org.freedesktop.systemd1.TransactionIsDestructive"
#: The bus's errors while systemd is not on it, as during ``systemctl daemon-reexec``: nothing was refused.
_AWAY = re.compile(
    r"org\.freedesktop\.DBus\.Error\.(NoReply|ServiceUnknown|NameHasNoOwner|Disconnected|Time.*)"
)
_STATES: Mapping[str, UnitState] = {
    "active": "active",
    "reloading": "active",
    "inactive": "inactive",
    "failed": "failed",
    "activating": "activating",
    "deactivating": "deactivating",
    "maintenance": "inactive",
}
#: One match rule for all units: the bus allows a connection 512 of them, and a host may have 1,024 workers.
_RULES = (
    f"type='signal',sender='{SYSTEMD}',interface='{PROPERTIES}',arg0='{UNIT}',path_namespace='{ROOT}/unit'",
    *(
        f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',path='{ROOT}',member='{member}'"
        for member in ("JobRemoved", "UnitFilesChanged", "Reloading")
    ),
)
_NAME = re.compile(r"gpuinfer-worker@(0|[1-9][0-9]{0,4})\.service")
#: The target of all workers: if it was stopped, none is to run until it is started or the host boots.
_TARGET_PATH = f"{ROOT}/unit/gpuinfer_2dworkers_2etarget"
_PATH = re.compile(rf"{ROOT}/unit/gpuinfer_2dworker_40(0|[1-9][0-9]{{0,4}})_2eservice")
#: The property with the time a state was entered, in microseconds of CLOCK_MONOTONIC.
_SINCE: Mapping[UnitState, str] = {
    "active": "ActiveEnterTimestampMonotonic",
    "activating": "InactiveExitTimestampMonotonic",
    "deactivating": "ActiveExitTimestampMonotonic",
    "inactive": "InactiveEnterTimestampMonotonic",
    "failed": "InactiveEnterTimestampMonotonic",
}


def unit_name(number: int | str) -> str:
    """Return the unit of worker ``number``, or a pattern for several."""
    return f"gpuinfer-worker@{number}.service"


def unit_path(number: int) -> str:
    """Return its object path, with each byte that is no letter or digit as _xx (sd_bus_path_encode(3))."""
    escaped = "".join(c if c.isalnum() else f"_{ord(c):02x}" for c in unit_name(number))
    return f"{ROOT}/unit/{escaped}"


class SystemdUnits:
    """The worker units of this host."""

    def __init__(
        self,
        *,
        address: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        acts: bool = True,
    ) -> None:
        """``address`` is the bus's, the system's own unless given. ``acts``: False for a dry run."""
        self._address = address
        self._clock = clock
        self._acts = acts
        self._bus: MessageBus | None = None
        #: False: the bus refuses to send us signals, and everything is read at each probe.
        self._hears = True
        self._properties: dict[int, dict[str, Any]] = {}
        self._dirty: set[int] = set()
        self._target_dirty = True
        self._target_stopped = False
        #: All instances that systemd has loaded.
        self._loaded: frozenset[int] = frozenset()
        self._synced_at: float | None = None
        #: Instance -> when it last became ready, when it failed, and how many starts failed since the reset.
        self._ready_at: dict[int, int] = {}
        self._failed_at: dict[int, int] = {}
        self._failed_starts: Counter[int] = Counter()
        #: Instances that failed, and that systemd has called inactive since the reset.
        self._failed: set[int] = set()

    async def open(self) -> None:
        """Connect to the system bus and ask for signals."""
        await self.close()
        try:
            bus = MessageBus(self._address, bus_type=BusType.SYSTEM)
            self._bus = await asyncio.wait_for(bus.connect(), CALL_TIMEOUT_S)
        except (OSError, DBusError, EOFError, TimeoutError) as exc:
            raise UnitsUnavailable(f"the system's D-Bus cannot be reached: {exc or 'timeout'}") from exc
        self._bus.add_message_handler(self._hear)
        try:
            hears = await self._match()
            await self._call("Subscribe")
        except (UnitRefused, UnitsUnavailable):  # systemd is not back on a bus that was restarted
            await self.close()
            raise
        self._hears, self._synced_at = hears, None

    async def _match(self) -> bool:
        """Subscribe to systemd's signals; return whether the bus allows it."""
        bus = {"destination": "org.freedesktop.DBus", "interface": "org.freedesktop.DBus"}
        try:
            for rule in _RULES:
                await self._call("AddMatch", "s", [rule], path="/org/freedesktop/DBus", **bus)
        except UnitRefused as exc:
            if self._hears:
                log.warning(
                    "signals_refused", reason=str(exc), hint="each probe asks systemd for all workers"
                )
            return False
        return True

    def _hear(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.path == _TARGET_PATH:
            self._target_dirty = True
        elif message.interface == PROPERTIES:
            self._changed(_PATH.fullmatch(message.path or ""))
        elif message.interface == MANAGER and message.member == "JobRemoved":
            self._changed(_NAME.fullmatch(message.body[2]))
        elif message.interface == MANAGER:
            self._synced_at = None

    def _changed(self, match: re.Match[str] | None) -> None:
        """Read an instance again; for one that is not known yet, list all that are loaded."""
        number = int(match[1]) if match else None
        if number in self._properties:
            self._dirty.add(number)
        elif number is not None:
            self._synced_at = None

    async def states(self, numbers: Collection[int]) -> Mapping[int, UnitView]:
        """Return the state of these instances, and of any other that is enabled or not inactive.

        Only what has changed is read.
        """
        if self._bus is None or not self._bus.connected:
            await self.open()
        synced = self._synced_at is not None and self._clock() - self._synced_at <= RESYNC_S
        if not synced or not self._hears:
            self._synced_at = self._clock()  # a signal that comes meanwhile clears it again
            try:
                self._loaded = frozenset(await self._list())
            except (UnitRefused, UnitsUnavailable):
                self._synced_at = None
                raise
            self._dirty.update(self._properties)
            self._target_dirty = True
        asked = self._loaded.union(numbers)
        self._properties = {number: known for number, known in self._properties.items() if number in asked}
        self._dirty = (self._dirty & asked) | (asked - self._properties.keys())
        while self._dirty:
            number = self._dirty.pop()  # a signal that comes meanwhile marks it again
            try:
                self._properties[number] = await self._ask(unit_path(number))
                await self._forgive(number)
            except (UnitRefused, UnitsUnavailable):
                self._dirty.add(number)
                raise
        await self._check_target()
        views = {number: self._view(number) for number in sorted(self._properties)}
        own = {*numbers}
        return {n: view for n, view in views.items() if n in own or view.enabled or view.state != "inactive"}

    async def _list(self) -> list[int]:
        """Return the instances that systemd has loaded: those that run, and those that a target wants."""
        reply = await self._call("ListUnitsByPatterns", "asas", [[], [unit_name("*")]])
        return [int(match[1]) for unit in reply.body[0] if (match := _NAME.fullmatch(unit[0]))]

    async def _ask(self, path: str) -> dict[str, Any]:
        """Return a unit's properties, and its restarts, which are a service's."""
        restarts = await self._call("Get", "ss", [SERVICE, "NRestarts"], path=path, interface=PROPERTIES)
        return {**await self._get(path), "NRestarts": restarts.body[0].value}

    async def _get(self, path: str) -> dict[str, Any]:
        unit = await self._call("GetAll", "s", [UNIT], path=path, interface=PROPERTIES)
        return {name: variant.value for name, variant in unit.body[0].items()}

    async def _check_target(self) -> None:
        """Read whether the target is masked, or was stopped: it was active since the boot, and is not now.

        It is read after the workers: a stop of the target reaches the target first, so that the stops of its
        workers are never taken for stops by hand.
        """
        while self._target_dirty:
            self._target_dirty = False  # a signal that comes meanwhile sets it again
            try:
                known = await self._get(_TARGET_PATH)
            except (UnitRefused, UnitsUnavailable):
                self._target_dirty = True
                raise
            stopped_at = known.get("InactiveEnterTimestampMonotonic")
            stopped = known.get("ActiveState") == "inactive" and bool(stopped_at)
            self._target_stopped = stopped or known.get("LoadState") == "masked"

    async def _forgive(self, number: int) -> None:
        """Reset the count of starts of a worker that became ready, or whose starts failed too often."""
        known = self._properties[number]
        state, restarts = known.get("ActiveState"), known["NRestarts"]
        if state not in ("inactive", "failed"):
            self._failed.discard(number)
        if not self._acts:
            return
        ready_at, failed_at = (int(known.get(_SINCE[name]) or 0) for name in ("active", "failed"))
        if state == "active" and not restarts and self._ready_at.get(number) != ready_at:
            self._ready_at[number] = ready_at
        elif state == "failed" and self._failed_at.get(number) != failed_at:
            self._failed_at[number] = failed_at
            self._failed_starts[number] += 1 + restarts
            if self._failed_starts[number] < FAILED_STARTS:
                return
            self._failed.add(number)
        else:
            return
        await self._reset(number)

    async def _reset(self, number: int) -> None:
        del self._failed_starts[number]
        try:
            await self._call("ResetFailedUnit", "s", [unit_name(number)])
        except UnitRefused as exc:  # not loaded: systemd has no count of it
            log.debug("not_reset", instance=number, reason=str(exc))

    def _view(self, number: int) -> UnitView:
        properties = self._properties[number]
        state = _STATES.get(str(properties.get("ActiveState")), "inactive")
        if state == "inactive" and number in self._failed:
            state = "failed"
        since_us, ready_us = (int(properties.get(_SINCE[name]) or 0) for name in (state, "active"))
        return UnitView(
            state=state,
            age_s=max(0.0, self._clock() - since_us / 1e6) if since_us else 0.0,
            enabled=properties.get("UnitFileState") in ("enabled", "enabled-runtime"),
            masked=properties.get("LoadState") == "masked",
            target_stopped=self._target_stopped,
            queued=bool((properties.get("Job") or (0,))[0]),
            restarts=int(properties.get("NRestarts") or 0),
            ready_age_s=max(0.0, self._clock() - ready_us / 1e6) if ready_us else None,
        )

    async def act(self, verb: Verb, number: int) -> None:
        """Queue a job; the count of starts is reset before a start."""
        member, mode = _METHODS[verb]
        try:
            if verb == "start":
                await self._reset(number)
                self._failed.discard(number)
            await self._call(member, "ss", [unit_name(number), mode])
        finally:
            if number in self._properties:
                self._dirty.add(number)

    async def alert(self, instance: str) -> None:
        """Start the alert unit of an instance. Raises UnitRefused, UnitsUnavailable."""
        await self._call("StartUnit", "ss", [f"gpuinfer-alert@{instance}.service", "replace"])

    async def _call(
        self,
        member: str,
        signature: str = "",
        body: list[Any] | None = None,
        *,
        destination: str = SYSTEMD,
        path: str = ROOT,
        interface: str = MANAGER,
    ) -> Message:
        if self._bus is None:
            raise UnitsUnavailable("not connected to the system's D-Bus")
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body or [],
        )
        try:
            reply = await asyncio.wait_for(self._bus.call(message), CALL_TIMEOUT_S)
        except (OSError, EOFError, DBusError, TimeoutError) as exc:
            await self.close()
            raise UnitsUnavailable(f"systemd does not answer {member}: {exc or 'timeout'}") from exc
        if reply is None or reply.message_type is MessageType.ERROR:
            words = reply.body[0] if reply is not None and reply.body else "no reason given"
            name = str(reply.error_name) if reply is not None else ""
            if _AWAY.fullmatch(name):
                raise UnitsUnavailable(f"systemd does not answer {member}: {words}")
            refused = UnitStopping if name == _STOPPING else UnitRefused
            asked = body[0] if body and isinstance(body[0], str) else None
            raise refused(f"systemd refuses {member}: {words} ({name})", asked)
        return reply

    async def close(self) -> None:
        """Disconnect. The units run on."""
        if self._bus is not None:
            self._bus.disconnect()
            self._bus = None
