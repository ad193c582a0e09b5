# SPDX-License-Identifier: Apache-2.0
"""Alerts: once when trouble begins, once when it ends, and not again after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from gpuinfer.alerts.alerting import Alerting, write
from gpuinfer.alerts.register import GONE_S, HOLD_S, Alert, Event, Known, step, told
from gpuinfer.alerts.resources import free_bytes, of_disks, of_memory
from gpuinfer.errors import UnitRefused
from gpuinfer.queue.depth import Lane
from gpuinfer.settings import load
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.state import GpuHealth, Instance, Key, Observation, Stranded
from gpuinfer.watcher.troubles import Troubles, of_queues, of_workers

pytestmark = pytest.mark.unit

DEAD = Alert("dead-letters", "1 task is set aside", "gpuinfer dead list")
AWAY = Alert("redis-away", "Redis cannot be read", "gpuinfer doctor redis")


class Clockwork:
    """Runs looks at chosen moments, and keeps the register between them."""

    def __init__(self) -> None:
        self.register: dict[str, Known] = {}

    def look(self, now: float, *present: Alert, unknown: Sequence[str] = ()) -> list[tuple[str, str]]:
        """Return what is told at this look: stage and name."""
        self.register, events = step(self.register, present, now, unknown)
        return [(event.stage, event.alert.name) for event in events]


def test_each_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    """However often it is seen between."""
    at = Clockwork()
    assert at.look(0, DEAD) == [("began", "dead-letters")]
    assert at.look(1, DEAD._replace(what="9 tasks are set aside")) == []
    assert at.look(2) == []
    assert at.look(2 + GONE_S) == [("ended", "dead-letters")]
    assert at.look(3 + GONE_S) == []
    assert at.look(4 + GONE_S, DEAD) == [("began", "dead-letters")]


def test_what_comes_back_soon_has_not_ended() -> None:
    """A trouble that flickers is one trouble."""
    at = Clockwork()
    at.look(0, DEAD)
    assert at.look(10) == at.look(10 + GONE_S - 1, DEAD) == at.look(11 + GONE_S) == []
    assert at.look(11 + 2 * GONE_S) == [("ended", "dead-letters")]


def test_what_passes_at_once_is_not_told_at_all() -> None:
    """A restart of Redis takes seconds: neither its beginning nor its end is news."""
    at, hold = Clockwork(), HOLD_S["redis-away"]
    assert at.look(0, AWAY) == at.look(hold / 2, AWAY) == at.look(hold - 1) == at.look(hold + GONE_S) == []
    at.look(100, AWAY)
    assert at.look(100 + hold, AWAY) == [("began", "redis-away")]


def test_what_cannot_be_seen_goes_on() -> None:
    """While Redis is away nobody knows whether it is full."""
    at, full = Clockwork(), Alert("redis-full", "Redis is full", "")
    at.look(0, full)
    assert at.look(5, unknown=("redis-full",)) == at.look(5 + 2 * GONE_S, unknown=("redis-full",)) == []
    assert at.register["redis-full"].told


def test_what_there_is() -> None:
    """Each kind, with what it is about in its name, and what to do."""
    ill = Instance(key=Key(3, "here"), gpu=GpuHealth(fault="Xid 79"))
    cooling = UnitMemory(state="failed", since=0.0, quarantined_until=50.0, why="it failed twice")
    masked = Instance(key=Key(5, "here"), masked=True, gpu=GpuHealth(fault="Xid 79"))
    own = [ill, Instance(key=Key(4, "here")), masked]
    found = [*of_workers(own, {Key(4, "here"): cooling}, now=10.0)]
    assert [(one.name, one.what) for one in found] == [
        ("quarantine.gpu3", "worker 3 is in quarantine: its GPU is not healthy (Xid 79)"),
        ("quarantine.gpu4", "worker 4 is in quarantine: it failed twice"),
    ]
    assert [*of_workers(own[1:2], {Key(4, "here"): cooling}, now=60.0)] == []
    stranded = {Lane("batch", "ocr-2.1"): Stranded(3, "do this")}
    dead, none = of_queues(2, stranded)
    assert (dead.name, none.name, none.remedy) == ("dead-letters", "no-worker.batch.ocr-2.1", "do this")
    assert [*of_queues(0, None)] == []
    assert [one.name for one in of_memory(96, 100)] == ["redis-full"]
    assert [*of_memory(96, 0)] == [*of_memory(90, 100)] == []
    assert [one.name for one in of_disks({"/a": 2**40, "/b": 2**20})] == ["disk.1"]


def test_a_units_environment_is_one_line_each(tmp_path: Path) -> None:
    """What stands in a message cannot become a variable of its own, or a command."""
    event = Event("began", DEAD._replace(what='a "b"\nEVIL=1 \\ $(reboot) `reboot`'), since=10.0)
    write(tmp_path / "x.env", told(event, "here", 20.0))
    lines = (tmp_path / "x.env").read_text().splitlines()
    assert len(lines) == 6 and all(line.startswith("ALERT_") for line in lines)
    assert 'ALERT_TEXT="a \\"b\\" EVIL=1 \\\\ \\$(reboot) \\`reboot\\`"' in lines
    over = told(Event("ended", DEAD, since=10.0), "here", 130.0)
    assert over["ALERT_TEXT"] == "over after 2 min: 1 task is set aside" and not over["ALERT_REMEDY"]


class Bus:
    """Keeps which units were started, with the environment that each found; may refuse."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.started: list[str] = []
        self.refuses = False

    async def start(self, instance: str) -> None:
        """Start one."""
        if self.refuses:
            raise UnitRefused("no")
        assert (self.run / f"{instance}.env").exists()
        self.started.append(instance)


class NoRedis:
    """A Redis that is full: it gives, and takes nothing."""

    def get(self, _key: str) -> bytes | None:
        """Return nothing."""
        return None

    def set(self, _key: str, _value: bytes) -> None:
        """Refuse."""
        raise redis.exceptions.OutOfMemoryError("OOM")


async def test_units_are_started_and_a_restart_repeats_nothing(tmp_path: Path) -> None:
    """This host's troubles are kept in its folder, the fleet's where Redis lets it."""
    bus, full = Bus(tmp_path), NoRedis()
    client: Any = full

    def made() -> Alerting:
        return Alerting("here", start=bus.start, state=tmp_path, run=tmp_path)

    disk = Alert("disk.0", "little room", "du")
    first = made()
    await first.tell(first.update(client, [disk], [DEAD], 0.0, away=False), 0.0)
    assert bus.started == ["disk.0:began", "dead-letters:began"]
    assert first.update(client, [disk], [DEAD], 1.0, away=False) == []
    second = made()
    assert [event.alert.name for event in second.update(client, [disk], None, 2.0, away=False)] == []
    events = [*second.update(client, [], None, 3.0, away=False)]
    events += second.update(client, [], None, 3.0 + GONE_S, away=True)
    bus.refuses = True  # it is logged, and the next one is tried all the same
    await second.tell(events, 40.0)
    assert [(event.stage, event.alert.name) for event in events] == [("ended", "disk.0")]
    assert made().update(client, [], None, 99.0, away=False) == []


class SomeRedis(NoRedis):
    """A Redis that is full, or away, or neither."""

    def __init__(self) -> None:
        self.kept: bytes | None = None
        self.full = self.away = False

    def get(self, _key: str) -> bytes | None:
        """Return what was kept."""
        if self.away:
            raise redis.exceptions.ConnectionError
        return self.kept

    def set(self, key: str, value: bytes) -> None:
        """Keep it, unless it is full."""
        if self.full:
            super().set(key, value)
        self.kept = value


def test_the_fleets_register_is_not_repeated_for_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """It is in Redis: what happens to this host's file does not matter."""
    some = SomeRedis()
    client: Any = some
    disk = Alert("disk.0", "little room", "du")
    for names in (["disk.0", "dead-letters"], ["disk.0"]):
        alerting = Alerting("here", state=tmp_path / "none")
        assert [e.alert.name for e in alerting.update(client, [disk], [DEAD], 0.0, away=False)] == names
        assert alerting.update(client, [disk], [DEAD], 1.0, away=False) == []


def test_a_redis_that_was_full_is_told_as_soon_as_it_has_space() -> None:
    """Until then nothing is repeated, and afterwards neither, by this watcher or the next."""
    some = SomeRedis()
    client: Any = some
    some.full, alerting = True, Alerting("here")
    with capture_logs() as logs:
        found = [alerting.update(client, [], [DEAD], now, away=False) for now in (0.0, 1.0, 2.0, 3.0)]
    assert [len(events) for events in found] == [1, 0, 0, 0]
    assert [entry["event"] for entry in logs] == ["alerts_not_kept"]
    some.full = False
    assert alerting.update(client, [], [DEAD], 4.0, away=False) == []
    assert Alerting("here").update(client, [], [DEAD], 5.0, away=False) == []


def test_what_has_been_told_is_not_known_before_redis_answers() -> None:
    """A watcher that has just been started waits for that."""
    some = SomeRedis()
    client: Any = some
    assert len(Alerting("here").update(client, [], [DEAD], 0.0, away=False)) == 1
    some.away, second = True, Alerting("here")
    assert second.update(client, [], [DEAD], 1.0, away=False) == []
    some.away = False
    assert second.update(client, [], [DEAD], 2.0, away=False) == []


def test_one_watcher_speaks_for_the_fleet(tmp_path: Path) -> None:
    """The first of those that live; each speaks for its own host."""
    settings = load(None, {"GPUINFER_MODELS_FOLDERS": str(tmp_path)}).settings
    seen = Observation(queues={}, host="b", live_hosts=frozenset({"a", "b"}), dead_letters=1)
    decision: Any = SimpleNamespace(history=SimpleNamespace(units={}), stranded={})
    kept: dict[str, bytes] = {}
    client: Any = SimpleNamespace(
        info=lambda _section: {"used_memory": 99, "maxmemory": 100}, get=kept.get, set=kept.__setitem__
    )

    def names(host: str, seen: Observation) -> list[str]:
        events = Troubles(settings, client, host, Alerting(host)).find(decision, seen, 50.0)
        return [event.alert.name for event in events if event.alert.kind != "disk"]

    assert names("b", seen) == []
    assert sorted(names("a", seen)) == ["dead-letters", "redis-full"]
    # Its successor finds what has been told of the fleet.
    assert names("b", Observation(queues={}, host="b", live_hosts=frozenset({"b"}), dead_letters=1)) == [
        "redis-full"
    ]


def test_room_is_measured_once_a_disk(tmp_path: Path) -> None:
    """Two folders on one disk are one trouble; one that is not there is none."""
    (tmp_path / "a").mkdir()
    found = free_bytes([tmp_path, tmp_path / "a", tmp_path / "none"])
    assert list(found) == [str(tmp_path)] and found[str(tmp_path)] > 0
