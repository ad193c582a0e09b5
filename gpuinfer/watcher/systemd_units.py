# SPDX-License-Identifier: Apache-2.0
"""Worker units over D-Bus. systemd tells by signals what has changed; only that is asked for again.

Interface: org.freedesktop.systemd1(5). What an unprivileged watcher may do, polkit decides; see
systemd/50-gpuinfer-watcher.rules.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dbus_fast import BusType, Message, MessageType
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusError

from gpuinfer.errors import UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.watcher.state import UnitState, Verb
from gpuinfer.watcher.units import UnitView

SYSTEMD = "org.freedesktop.systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"
PROPERTIES = "org.freedesktop.DBus.Properties"
ROOT = "/org/freedesktop/systemd1"
#: Everything is asked for again this often, should a signal ever be missed.
RESYNC_S = 60.0
CALL_TIMEOUT_S = 10.0
#: Method, signature, job mode. A start never undoes a stop of the worker that waits or is under way ("fail"):
#: the administrator may have asked for it.
_METHODS: Mapping[Verb, tuple[str, str, str]] = {
    "start": ("StartUnit", "ss", "fail"),
    "stop": ("StopUnit", "ss", "replace"),
    "reset": ("ResetFailedUnit", "s", ""),
}
#: What systemd calls a start that would undo a stop.
_STOPPING = "org.freedesktop.systemd1.TransactionIsDestructive"
_STATES: Mapping[str, UnitState] = {
    "active": "active",
    "reloading": "active",
    "inactive": "inactive",
    "failed": "failed",
    "activating": "activating",
    "deactivating": "deactivating",
    "maintenance": "inactive",
}
#: The property that says since when a state lasts, in microseconds of CLOCK_MONOTONIC.
_SINCE: Mapping[UnitState, str] = {
    "active": "ActiveEnterTimestampMonotonic",
    "activating": "InactiveExitTimestampMonotonic",
    "deactivating": "ActiveExitTimestampMonotonic",
    "inactive": "InactiveEnterTimestampMonotonic",
    "failed": "InactiveEnterTimestampMonotonic",
}


def unit_name(number: int) -> str:
    """Return the unit of worker ``number``."""
    return f"gpuinfer-worker@{number}.service"


def unit_path(number: int) -> str:
    """Return its object path: every byte that is no letter or digit as _xx, as sd_bus_path_encode(3) does."""
    escaped = "".join(c if c.isalnum() else f"_{ord(c):02x}" for c in unit_name(number))
    return f"{ROOT}/unit/{escaped}"


class SystemdUnits:
    """The worker units of this host."""

    def __init__(
        self,
        numbers: Iterable[int],
        *,
        address: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``address`` is the bus's, the system's own unless given."""
        self._address = address
        self._numbers = tuple(numbers)
        self._clock = clock
        self._paths = {unit_path(number): number for number in self._numbers}
        self._bus: MessageBus | None = None
        self._properties: dict[int, dict[str, Any]] = {}
        self._dirty: set[int] = set()
        self._synced_at = 0.0

    async def open(self) -> None:
        """Connect to the system bus and ask for signals."""
        try:
            self._bus = await MessageBus(self._address, bus_type=BusType.SYSTEM).connect()
        except (OSError, DBusError, EOFError) as exc:
            raise UnitsUnavailable(f"the system's D-Bus cannot be reached: {exc}") from exc
        self._bus.add_message_handler(self._hear)
        for rule in self._rules():
            await self._call(
                "AddMatch",
                "s",
                [rule],
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
            )
        await self._call("Subscribe")
        self._dirty = set(self._numbers)
        self._synced_at = self._clock()

    def _rules(self) -> list[str]:
        changed = f"type='signal',sender='{SYSTEMD}',interface='{PROPERTIES}',path='{{}}'"
        of_manager = f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',path='{ROOT}',member='{{}}'"
        members = ("JobRemoved", "UnitFilesChanged", "Reloading")
        return [*map(changed.format, self._paths), *map(of_manager.format, members)]

    def _hear(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        if message.path in self._paths:
            self._dirty.add(self._paths[message.path])
        elif message.interface == MANAGER and message.member == "JobRemoved":
            self._dirty.update(n for n in self._numbers if unit_name(n) == message.body[2])
        elif message.interface == MANAGER:
            self._dirty.update(self._numbers)

    async def look(self) -> Mapping[int, UnitView]:
        """Return all states; only what has changed is asked for."""
        if self._bus is None or not self._bus.connected:
            await self.open()
        if self._clock() - self._synced_at > RESYNC_S:
            self._dirty.update(self._numbers)
            self._synced_at = self._clock()
        while self._dirty:
            number = self._dirty.pop()  # a signal that comes meanwhile marks it again
            try:
                self._properties[number] = await self._ask(unit_path(number))
            except (UnitRefused, UnitsUnavailable):
                self._dirty.add(number)
                raise
        return {number: self._view(self._properties[number]) for number in self._numbers}

    async def _ask(self, path: str) -> dict[str, Any]:
        """Return a unit's properties, and of a service's own its restarts."""
        unit = await self._call("GetAll", "s", [UNIT], path=path, interface=PROPERTIES)
        restarts = await self._call("Get", "ss", [SERVICE, "NRestarts"], path=path, interface=PROPERTIES)
        values = {name: variant.value for name, variant in unit.body[0].items()}
        return {**values, "NRestarts": restarts.body[0].value}

    def _view(self, properties: Mapping[str, Any]) -> UnitView:
        state = _STATES.get(str(properties.get("ActiveState")), "inactive")
        since_us = int(properties.get(_SINCE[state]) or 0)
        return UnitView(
            state=state,
            age_s=max(0.0, self._clock() - since_us / 1e6) if since_us else 0.0,
            enabled=properties.get("UnitFileState") in ("enabled", "enabled-runtime"),
            masked=properties.get("LoadState") == "masked",
            queued=bool((properties.get("Job") or (0,))[0]),
            restarts=int(properties.get("NRestarts") or 0),
        )

    async def act(self, verb: Verb, number: int) -> None:
        """Queue a job, or reset."""
        member, signature, mode = _METHODS[verb]
        body = [unit_name(number), mode] if mode else [unit_name(number)]
        try:
            await self._call(member, signature, body)
        finally:
            self._dirty.add(number)

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
            name = reply.error_name if reply is not None else ""
            refused = UnitStopping if name == _STOPPING else UnitRefused
            raise refused(f"systemd refuses {member}: {words} ({name})", (body or [None])[0])
        return reply

    async def close(self) -> None:
        """Disconnect. The units run on."""
        if self._bus is not None:
            self._bus.disconnect()
            self._bus = None
