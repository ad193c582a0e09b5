# SPDX-License-Identifier: Apache-2.0
"""The contract of what runs the workers: plain processes, and systemd's units on a booted systemd."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from dbus_fast import Message

from gpuinfer.errors import UnitRefused, UnitStopping, UnitsUnavailable
from gpuinfer.watcher.process_units import ProcessUnits
from gpuinfer.watcher.state import Verb
from gpuinfer.watcher.systemd_units import SystemdUnits, unit_name, unit_path
from gpuinfer.watcher.units import Units, UnitView
from tests.conftest import need
from tests.host.container import Container
from tests.host.root import missing, root

#: A worker of a third of a second to start; one with a file of its number fails, or is held as it starts.
WORKER = """
import os, signal, socket, sys, time
time.sleep(0.3)
while os.path.exists(sys.argv[1] + "-hold"):
    time.sleep(0.05)
if os.path.exists(sys.argv[1]):
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # an exception could strike in a finaliser, and be lost
name = os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1\\nSTATUS=x", name)
while not os.path.exists(sys.argv[1] + "-grown"):
    time.sleep(0.05)
os.unlink(sys.argv[1] + "-grown")
sys.exit(80)
"""
UNIT = """
[Unit]
StartLimitIntervalSec=1h
StartLimitBurst=4
[Service]
Type=notify
NotifyAccess=all
ExecStart=/bin/sh -c 'sleep 0.3; while test -e /fail-%i-hold; do sleep 0.1; done; \
  test -e /fail-%i && exit 3; systemd-notify --ready; \
  until test -e /fail-%i-grown; do sleep 0.1; done; end=$(cat /fail-%i-grown); rm /fail-%i-grown; \
  exit $${end:-80}'
@SHIPPED@
[Install]
WantedBy=multi-user.target
"""
#: Since when a unit is active, as systemd has it.
ENTERED = "ActiveEnterTimestampMonotonic"
SLOW_STOP = "/etc/systemd/system/gpuinfer-worker@0.service.d/slow.conf"
BACKENDS = [
    pytest.param("process", marks=pytest.mark.integration),
    pytest.param("systemd", marks=pytest.mark.host),
]


class Place:
    """A back end with three instances, and ways to make one fail, grow too large, or stand as it starts."""

    def __init__(
        self,
        units: Units,
        fail: Callable[[int, bool], None],
        grow: Callable[[int], None],
        hold: Callable[[int, bool], None],
        container: Container | None = None,
    ) -> None:
        self.units = units
        self.fail = fail
        self.grow = grow
        self.hold = hold
        self.container = container

    async def until(self, number: int, test: Callable[[UnitView], bool], what: str) -> UnitView:
        """Look until an instance is as wanted."""
        deadline = time.monotonic() + 60
        while True:
            view = (await self.units.states(range(3)))[number]
            if test(view):
                return view
            assert time.monotonic() < deadline, f"waited for {what}, is {view}"
            await asyncio.sleep(0.02)

    async def accepts(self, verb: Verb, number: int) -> None:
        """Tell an instance to start until no stop is on its way any more."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return await self.units.act(verb, number)
            except UnitStopping:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)

    async def becomes(self, number: int, state: str) -> UnitView:
        """Look until an instance is in a state."""
        return await self.until(number, lambda view: view.state == state, state)


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    need(not missing(), missing())
    with Container(root(), name="units") as booted:
        kept = ("ExecStopPost=", "SuccessExitStatus=", "RestartForceExitStatus=")
        shipped = (Path(__file__).parents[2] / "systemd/gpuinfer-worker@.service").read_text(encoding="utf-8")
        lines = [line for line in shipped.splitlines() if line.startswith(kept)]
        unit = UNIT.replace("@SHIPPED@", "\n".join(lines))
        booted.put("/etc/systemd/system/gpuinfer-worker@.service", unit)
        booted.ok("systemctl daemon-reload")
        yield booted


@pytest.fixture(params=BACKENDS)
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    made = (
        _processes(tmp_path) if request.param == "process" else _systemd(request.getfixturevalue("container"))
    )
    await made.units.open()
    yield made
    await made.units.close()
    if made.container:
        made.container.ok("systemctl stop 'gpuinfer-worker@*'; systemctl reset-failed; rm -f /fail-*")


def _processes(folder: Path) -> Place:
    def fail(number: int, on: bool) -> None:
        (folder / f"fail-{number}").touch() if on else (folder / f"fail-{number}").unlink()

    def command(number: int) -> list[str]:
        return [sys.executable, "-c", WORKER, str(folder / f"fail-{number}")]

    def grow(number: int) -> None:
        (folder / f"fail-{number}-grown").touch()

    def hold(number: int, on: bool) -> None:
        file = folder / f"fail-{number}-hold"
        file.touch() if on else file.unlink()

    return Place(ProcessUnits(command), fail, grow, hold)


def _systemd(container: Container) -> Place:
    def fail(number: int, on: bool) -> None:
        container.ok(f"touch /fail-{number}" if on else f"rm /fail-{number}")

    def grow(number: int) -> None:
        container.ok(f"touch /fail-{number}-grown")

    def hold(number: int, on: bool) -> None:
        container.ok(f"touch /fail-{number}-hold" if on else f"rm /fail-{number}-hold")

    return Place(SystemdUnits(address=address(container)), fail, grow, hold, container)


T = TypeVar("T")


async def told_of(units: SystemdUnits, number: int, act: Callable[[], T]) -> T:
    """Do what ends a job of an instance; wait until the watcher was told of that end, and return the outcome.

    systemd signals what has changed of a unit before the end of its job.
    """
    told = asyncio.Event()

    def hear(message: Message) -> None:
        if message.member == "JobRemoved" and message.body[2] == unit_name(number):
            told.set()

    assert units._bus is not None
    units._bus.add_message_handler(hear)
    try:
        outcome = act()
        await asyncio.wait_for(told.wait(), 60)
    finally:
        units._bus.remove_message_handler(hear)
    return outcome


def address(container: Container) -> str:
    """Return the address of the bus in a container, as it is seen from outside."""
    return f"unix:path=/proc/{container._leader}/root/run/dbus/system_bus_socket"


async def test_all_instances_are_told_though_none_was_ever_started(place: Place) -> None:
    """An instance that systemd has not loaded is inactive, and no less there."""
    views = await place.units.states(range(3))
    assert {number: view.state for number, view in views.items()} == dict.fromkeys(range(3), "inactive")


async def test_a_start_goes_through_activating_to_active(place: Place) -> None:
    """And the time in a state counts from when it was entered."""
    begun = time.monotonic()
    place.hold(1, True)
    await place.units.act("start", 1)
    await place.becomes(1, "activating")
    place.hold(1, False)
    view = await place.becomes(1, "active")
    assert view.age_s <= time.monotonic() - begun
    assert (await place.units.states(range(3)))[0].state == "inactive"


async def test_a_stop_ends_it_without_a_failure(place: Place) -> None:
    """SIGTERM, and inactive."""
    await place.units.act("start", 0)
    await place.becomes(0, "active")
    await place.units.act("stop", 0)
    await place.becomes(0, "inactive")


async def test_commands_that_change_nothing_are_no_errors(place: Place) -> None:
    """A watcher whose view was a moment late does no harm."""
    await place.units.act("stop", 2)
    await place.accepts("start", 2)  # the stop of what does not run takes a moment, too
    await place.units.act("start", 2)
    await place.becomes(2, "active")
    await place.units.act("start", 2)
    assert (await place.units.states(range(3)))[2].state == "active"


async def test_a_failure_stays_until_it_is_started_again(place: Place) -> None:
    """A start clears it first."""
    place.fail(0, True)
    await place.units.act("start", 0)
    await place.becomes(0, "failed")
    place.fail(0, False)
    await place.units.act("start", 0)
    await place.becomes(0, "active")


async def test_what_has_grown_too_large_is_started_anew(place: Place) -> None:
    """A worker past worker.max_memory_mb ends by itself: a new one comes up, and nothing has failed."""
    await place.units.act("start", 0)
    await place.becomes(0, "active")
    place.hold(0, True)
    place.grow(0)
    states: set[str] = set()

    def starts_again(view: UnitView) -> bool:
        states.add(view.state)
        return view.state == "activating"

    await place.until(0, starts_again, "a new start")
    place.hold(0, False)
    await place.becomes(0, "active")
    assert "failed" not in states


async def test_a_stop_while_it_starts_is_heard(place: Place) -> None:
    """Nothing that was to stop comes up later: not by the time one that was started after it has come up."""
    place.hold(0, True)
    await place.units.act("start", 0)
    await place.becomes(0, "activating")
    await place.units.act("stop", 0)
    await place.becomes(0, "inactive")
    place.hold(0, False)
    await place.units.act("start", 1)
    await place.becomes(1, "active")
    assert (await place.units.states(range(3)))[0].state == "inactive"


async def test_a_start_does_not_undo_a_stop(place: Place) -> None:
    """What is being stopped stops, by anybody's order; the start is refused by an error of its own."""
    if place.container:
        waits = "/bin/sh -c 'until test -e /go; do sleep 0.1; done'"
        place.container.put(SLOW_STOP, f"[Service]\nExecStop={waits}\n")
        place.container.ok("systemctl daemon-reload")
    try:
        await place.units.act("start", 0)
        await place.becomes(0, "active")
        await place.units.act("stop", 0)
        with pytest.raises(UnitStopping, match=r"stop|destructive"):
            await place.units.act("start", 0)
    finally:
        if place.container:
            place.container.ok("touch /go")
    await place.becomes(0, "inactive")
    if place.container:
        place.container.ok(f"rm /go {SLOW_STOP}; systemctl daemon-reload")


# -- systemd alone --------------------------------------------------------------------------


@pytest.mark.host
async def test_what_an_administrator_does_is_heard(container: Container) -> None:
    """Start, stop, enable and mask by systemctl reach the watcher by signals."""
    place = _systemd(container)
    await place.units.open()
    try:
        await place.units.states(range(3))
        container.ok("systemctl enable --now gpuinfer-worker@2")
        await place.until(2, lambda view: view.state == "active" and view.enabled, "an enabled, active unit")
        container.ok("systemctl disable --now gpuinfer-worker@2 && systemctl mask gpuinfer-worker@2")
        await place.until(2, lambda view: view.masked and not view.enabled, "a masked unit")
        with pytest.raises(UnitRefused, match="masked"):
            await place.units.act("start", 2)
        container.ok("systemctl unmask gpuinfer-worker@2")
        await place.until(2, lambda view: not view.masked, "an unmasked unit")
    finally:
        await place.units.close()


@pytest.mark.host
async def test_restarts_by_systemd_are_counted(container: Container) -> None:
    """What does not come up is activating all the time; how often it was tried again tells it apart."""
    drop_in = "/etc/systemd/system/gpuinfer-worker@1.service.d/restart.conf"
    container.put(drop_in, "[Unit]\nStartLimitBurst=1000\n[Service]\nRestart=on-failure\nRestartSec=1\n")
    container.ok("systemctl daemon-reload")
    place = _systemd(container)
    await place.units.open()
    try:
        place.fail(1, True)
        await place.units.act("start", 1)
        view = await place.until(1, lambda view: view.restarts >= 2, "two restarts")
        assert view.state in ("activating", "deactivating")
        await place.units.act("stop", 1)
        await place.becomes(1, "inactive")
        place.fail(1, False)
        await place.units.act("start", 1)
        assert (await place.becomes(1, "active")).restarts == 0
    finally:
        await place.units.close()
        container.ok(f"rm -f /fail-1 {drop_in}; systemctl daemon-reload; systemctl stop gpuinfer-worker@1")


@pytest.mark.host
async def test_only_what_has_changed_is_asked_for(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quiet host costs no call at all."""
    units = SystemdUnits(address=address(container))
    await units.open()
    try:
        await units.states(range(3))
        calls: list[object] = []
        real = units._call

        async def counted(*args: object, **more: object) -> object:
            calls.append(args)
            return await real(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(units, "_call", counted)
        for _ in range(10):
            await units.states(range(3))
        assert calls == []
    finally:
        await units.close()


@pytest.mark.host
async def test_the_bus_may_go_and_come_back(container: Container) -> None:
    """A lost connection is an error once, and mended at the next look."""
    units = SystemdUnits(address=address(container))
    await units.open()
    assert units._bus is not None
    units._bus.disconnect()
    await asyncio.wait_for(units._bus.wait_for_disconnect(), 60)  # type: ignore[no-untyped-call]
    assert len(await units.states(range(3))) == 3
    container.ok("systemctl restart dbus")
    for _ in range(600):  # systemd may be back on the bus later than we are
        with suppress(UnitsUnavailable, UnitRefused):
            if len(await units.states(range(3))) == 3:
                break
        await asyncio.sleep(0.1)
    container.ok("systemctl start gpuinfer-worker@1")
    await Place(units, lambda *_: None, lambda _: None, lambda *_: None).becomes(1, "active")
    await units.close()


@pytest.mark.host
async def test_more_instances_than_a_connection_may_have_rules(container: Container) -> None:
    """And one beyond all that were asked for, which somebody has started."""
    units = SystemdUnits(address=address(container))
    container.ok("systemctl start gpuinfer-worker@777")
    try:
        views = await units.states(range(600))
        assert (len(views), views[777].state, views[599].state) == (601, "active", "inactive")
    finally:
        await units.close()


@pytest.mark.host
async def test_no_start_is_attempted_too_often(container: Container) -> None:
    """More than the unit allows of ours, by hand, and after the end at a limit of time or memory."""
    units = SystemdUnits(address=address(container))
    place = Place(units, lambda *_: None, lambda _: None, lambda *_: None, container)
    await units.open()
    for _ in range(5):
        await place.units.act("start", 0)
        await place.becomes(0, "active")
        await place.units.act("stop", 0)
        await place.becomes(0, "inactive")
    for _ in range(5):
        container.ok("systemctl restart gpuinfer-worker@0")
        since = int(container.ok(f"systemctl show -P {ENTERED} gpuinfer-worker@0"))
        while units._properties[0][ENTERED] != since:
            await asyncio.sleep(0.02)  # signals are heard meanwhile
            await place.becomes(0, "active")
    await units.close()
    container.ok("systemctl restart gpuinfer-worker@0")
    for end in [80, 81] * 3:
        before = container.ok("systemctl show -P MainPID gpuinfer-worker@0").strip()
        container.ok(f"echo {end} >/fail-0-grown")
        again = f"[ $(systemctl show -P MainPID gpuinfer-worker@0) != {before} ]"
        container.until(f"{again} && systemctl -q is-active gpuinfer-worker@0", timeout=60)


@pytest.mark.host
async def test_a_start_by_hand_after_failures_is_not_attempted_too_often(container: Container) -> None:
    """After a crash loop that systemd has ended, and after many starts by hand that failed."""
    drop_in = "/etc/systemd/system/gpuinfer-worker@1.service.d/loop.conf"
    container.put(drop_in, "[Unit]\nStartLimitBurst=10\n[Service]\nRestart=on-failure\nRestartSec=0.1\n")
    container.put(drop_in.replace("@1", "@2"), "[Unit]\nStartLimitBurst=10\n")
    container.ok("systemctl stop 'gpuinfer-worker@*'; systemctl reset-failed; systemctl daemon-reload")
    container.ok("touch /fail-1 /fail-2; systemctl start --no-block gpuinfer-worker@1")
    units = SystemdUnits(address=address(container))
    place = Place(units, lambda *_: None, lambda _: None, lambda *_: None, container)
    await units.open()
    try:
        await place.becomes(1, "failed")
        container.until("[ $(systemctl show -P ActiveState gpuinfer-worker@1) = inactive ]", timeout=60)
        await place.until(
            1, lambda view: (view.state, view.restarts) == ("failed", 0), "a reset, failed unit"
        )
        container.ok("rm /fail-1; systemctl start gpuinfer-worker@1")
        await place.becomes(1, "active")
        for _ in range(12):
            said = await told_of(units, 2, lambda: container.sh("systemctl start gpuinfer-worker@2"))
            assert said.code and "too often" not in said.output
            assert (await place.units.states(range(3)))[2].state == "failed"
        container.ok("rm /fail-2; systemctl start gpuinfer-worker@2")
    finally:
        await place.units.close()
        container.ok(f"rm -f /fail-* {drop_in} {drop_in.replace('@1', '@2')}; systemctl daemon-reload")
        container.ok("systemctl stop 'gpuinfer-worker@*'; systemctl reset-failed")


@pytest.mark.integration
async def test_no_bus_is_a_typed_error(tmp_path: Path) -> None:
    """The message says what cannot be reached."""
    units = SystemdUnits(address=f"unix:path={tmp_path}/none")
    with pytest.raises(UnitsUnavailable, match="D-Bus cannot be reached"):
        await units.states(range(3))


@pytest.mark.unit
def test_object_paths_are_escaped_as_systemd_does() -> None:
    """sd_bus_path_encode(3)."""
    assert unit_path(12) == "/org/freedesktop/systemd1/unit/gpuinfer_2dworker_4012_2eservice"


@pytest.mark.integration
async def test_children_end_with_their_watcher(tmp_path: Path) -> None:
    """Killed by SIGKILL, a watcher of plain processes leaves none behind."""
    script = f"""
import asyncio, sys
from gpuinfer.watcher.process_units import ProcessUnits
async def main():
    units = ProcessUnits(lambda n: [sys.executable, "-c", {WORKER!r}, "/none"])
    await units.act("start", 0)
    while (await units.states([0]))[0].state != "active":
        await asyncio.sleep(0.05)
    print(units._children[0].process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    child = int(await process.stdout.readline())
    process.kill()
    await process.wait()
    for _ in range(1200):
        if not _lives(child):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"process {child} still runs")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.integration
async def test_a_process_has_what_is_special_about_it(tmp_path: Path) -> None:
    """Variables of its own beside those of all, read at each start; what cannot be read is refused."""
    special = [{"SPECIAL": "yes"}]

    def of(number: int) -> dict[str, str]:
        if not special:
            raise ValueError("line 1 is no NAME=value")
        return special[number]

    told = tmp_path / "told"
    script = f"import os; open({str(told)!r}, 'w').write(os.environ['SPECIAL'] + os.environ['COMMON'])"
    units = ProcessUnits(lambda _: [sys.executable, "-c", script], {**os.environ, "COMMON": "!"}, special=of)
    await units.act("start", 0)
    await Place(units, lambda *_: None, lambda _: None, lambda *_: None).becomes(0, "inactive")
    assert told.read_text() == "yes!"
    special.clear()
    with pytest.raises(UnitRefused, match="line 1"):
        await units.act("start", 0)
    assert (await units.states(range(3)))[0].state == "inactive"
    await units.close()
