# SPDX-License-Identifier: Apache-2.0
"""Worker units over a bus that refuses, restarts and lists what nobody asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from dbus_fast import Message, MessageType

from gpuinfer.errors import UnitRefused, UnitsUnavailable
from gpuinfer.watcher import systemd_units
from gpuinfer.watcher.systemd_units import RESYNC_S, SystemdUnits, unit_name, unit_path

pytestmark = pytest.mark.unit

LIMIT = 512
TARGET = "/org/freedesktop/systemd1/unit/gpuinfer_2dworkers_2etarget"


@dataclass
class Bus:
    """A system bus with systemd on it, as far as the watcher asks."""

    #: Unit -> its properties; one that is not named is inactive and not loaded.
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    #: The error that it refuses with.
    error: str = "Refused"
    calls: list[tuple[str, Any]] = field(default_factory=list)
    connected: bool = True
    rules: int = 0
    hear: Any = None
    opened: int = 0

    def __call__(self, *_: object, **__: object) -> Bus:
        return self

    async def connect(self) -> Bus:
        self.connected, self.rules = True, 0
        self.opened += 1
        return self

    def disconnect(self) -> None:
        self.connected = False

    def add_message_handler(self, hear: object) -> None:
        self.hear = hear

    async def call(self, message: Message) -> Any:
        self.calls.append((str(message.member), message.body[0] if message.body else message.path))
        if message.member == "AddMatch":
            self.rules += 1
        if message.member in self.refuses or self.rules > LIMIT:
            words = ["it is not allowed"]
            return SimpleNamespace(message_type=MessageType.ERROR, error_name=self.error, body=words)
        return SimpleNamespace(message_type=MessageType.METHOD_RETURN, body=self.answer(message))

    def answer(self, message: Message) -> list[Any]:
        if message.member == "ListUnitsByPatterns":
            return [[[name] for name in self.units]]
        name = next((name for name in self.units if unit_path(number(name)) == message.path), "")
        found = self.target if message.path == TARGET else self.units.get(name, {})
        known = {"ActiveState": "inactive", "NRestarts": 0, **found}
        if message.member == "GetAll":
            return [{key: SimpleNamespace(value=value) for key, value in known.items()}]
        return [SimpleNamespace(value=known["NRestarts"])]

    def count(self, member: str) -> int:
        return sum(called == member for called, _ in self.calls)

    def signal(self, path: str) -> None:
        changed = Message(path=path, interface=systemd_units.PROPERTIES, member="PropertiesChanged")
        changed.message_type = MessageType.SIGNAL
        self.hear(changed)


def number(name: str) -> int:
    return int(name.partition("@")[2].partition(".")[0])


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    made = Bus()
    monkeypatch.setattr(systemd_units, "MessageBus", made)
    return made


async def test_a_thousand_instances_need_no_more_rules_than_one(bus: Bus) -> None:
    """The bus allows a connection 512 match rules."""
    units = SystemdUnits()
    assert len(await units.states(range(1024))) == 1024
    assert bus.rules < 10


async def test_a_bus_that_refuses_signals_is_asked_at_each_look(bus: Bus) -> None:
    """Slower, and never wrong."""
    bus.refuses = {"AddMatch"}
    units = SystemdUnits()
    assert (await units.states([0]))[0].state == "inactive"
    bus.units[unit_name(0)] = {"ActiveState": "activating"}
    assert (await units.states([0]))[0].state == "activating"
    assert bus.opened == 1


async def test_a_bus_that_was_restarted_is_joined_again(bus: Bus) -> None:
    """systemd may be back on it later than we are: nothing half open is used until then."""
    units = SystemdUnits()
    await units.states([0])
    bus.connected = False
    bus.refuses = {"Subscribe"}
    for _ in range(2):
        with pytest.raises(UnitRefused):
            await units.states([0])
    bus.refuses = set()
    bus.units[unit_name(0)] = {"ActiveState": "active"}
    assert (await units.states([0]))[0].state == "active"
    before = len(bus.calls)
    await units.states([0])
    assert len(bus.calls) == before  # it hears again


async def test_what_is_enabled_or_runs_counts_whatever_is_asked_for(bus: Bus) -> None:
    """An instance that a target wants, or that somebody has started; not one that is merely loaded."""
    bus.units[unit_name(3)] = {"UnitFileState": "enabled"}
    bus.units[unit_name(5)] = {"ActiveState": "activating"}
    bus.units[unit_name(7)] = {"UnitFileState": "disabled"}
    units = SystemdUnits()
    assert sorted(await units.states([0])) == [0, 3, 5]
    bus.units[unit_name(9)] = {"ActiveState": "active"}
    assert sorted(await units.states([0])) == [0, 3, 5]
    bus.signal(unit_path(9))
    assert sorted(await units.states([0])) == [0, 3, 5, 9]
    bus.units[unit_name(9)] = {"ActiveState": "inactive"}
    bus.signal(unit_path(9))
    assert sorted(await units.states([0])) == [0, 3, 5]


async def test_a_lost_signal_is_made_good_later(bus: Bus) -> None:
    """All is asked for again once a minute."""
    clock = Clock()
    units = SystemdUnits(clock=clock)
    await units.states([0])
    bus.units[unit_name(0)] = {"ActiveState": "failed"}
    assert (await units.states([0]))[0].state == "inactive"
    clock.now += RESYNC_S + 1
    assert (await units.states([0]))[0].state == "failed"


async def test_a_start_meets_no_limit(bus: Bus) -> None:
    """systemd's count of starts is reset before each one of ours; a unit that is not loaded has none."""
    units = SystemdUnits()
    await units.states([0])
    bus.refuses = {"ResetFailedUnit"}
    await units.act("start", 0)
    assert [member for member, _ in bus.calls[-2:]] == ["ResetFailedUnit", "StartUnit"]


@pytest.mark.parametrize(("acts", "resets"), [(True, [1, 1, 2, 2]), (False, [0] * 4)])
async def test_a_start_by_hand_is_not_counted_either(bus: Bus, acts: bool, resets: list[int]) -> None:
    """Once it is ready; a restart that was none by hand still counts. A dry run resets nothing."""
    units, seen = SystemdUnits(acts=acts), []
    for began, restarts in ((100, 0), (100, 0), (200, 0), (300, 1)):
        bus.units[unit_name(0)] = {
            "ActiveState": "active",
            "ActiveEnterTimestampMonotonic": began,
            "NRestarts": restarts,
        }
        if bus.hear:
            bus.signal(unit_path(0))
        await units.states([0])
        seen.append(bus.count("ResetFailedUnit"))
    assert seen == resets


async def test_a_stop_of_the_target_is_seen(bus: Bus) -> None:
    """It was active since the boot, and is not any more. One that never was has not been stopped."""
    units, stopped = SystemdUnits(), []
    for state, since in (("inactive", 0), ("active", 0), ("inactive", 7), ("active", 7)):
        bus.target = {"ActiveState": state, "InactiveEnterTimestampMonotonic": since}
        if bus.hear:
            bus.signal(TARGET)
        stopped.append((await units.states([0]))[0].target_stopped)
    assert stopped == [False, False, True, False]
    assert (await SystemdUnits().states([0]))[0].target_stopped is False
    bus.target = {"ActiveState": "inactive", "InactiveEnterTimestampMonotonic": 0, "LoadState": "masked"}
    assert (await SystemdUnits().states([0]))[0].target_stopped is True, "after a boot, too"


async def test_what_failed_often_is_forgiven_and_stays_failed(bus: Bus) -> None:
    """A crash loop, or some starts by hand: systemd's count is reset, and calls the unit inactive then."""
    units = SystemdUnits()
    for at, restarts, resets in ((1, 0, 0), (2, 2, 0), (2, 2, 0), (3, 0, 1), (4, 9, 2)):
        bus.units[unit_name(0)] = {
            "ActiveState": "failed",
            "InactiveEnterTimestampMonotonic": at,
            "NRestarts": restarts,
        }
        if bus.hear:
            bus.signal(unit_path(0))
        assert (await units.states([0]))[0].state == "failed"
        assert bus.count("ResetFailedUnit") == resets
    bus.units[unit_name(0)] = {"ActiveState": "inactive", "InactiveEnterTimestampMonotonic": 4}
    bus.signal(unit_path(0))
    assert (await units.states([0]))[0].state == "failed"
    await units.act("start", 0)
    assert (await units.states([0]))[0].state == "inactive"  # it had no effect


@pytest.mark.parametrize("error", ["NoReply", "ServiceUnknown", "NameHasNoOwner"])
async def test_a_systemd_that_is_executed_again_refuses_nothing(bus: Bus, error: str) -> None:
    """A refused start would be quarantined; this one is tried again at the next probe."""
    units = SystemdUnits()
    await units.states([0])
    bus.refuses, bus.error = {"StartUnit", "ListUnitsByPatterns"}, f"org.freedesktop.DBus.Error.{error}"
    with pytest.raises(UnitsUnavailable, match="systemd does not answer StartUnit"):
        await units.act("start", 0)
    units._synced_at = None
    with pytest.raises(UnitsUnavailable, match="systemd does not answer ListUnits"):
        await units.states([0])
    bus.error = "org.freedesktop.DBus.Error.AccessDenied"
    with pytest.raises(UnitRefused, match="systemd refuses ListUnits"):
        await units.states([0])
