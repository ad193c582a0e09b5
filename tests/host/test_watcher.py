# SPDX-License-Identifier: Apache-2.0
"""The watcher on a booted systemd with four instances: up, down, killed, and what it must never do.

The units are stand-ins that only sleep; what Redis says of them is written by the test. The watcher is
the real command; it runs outside the container and reaches its bus through /proc.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import redis

from gpuinfer.queue import keys
from gpuinfer.queue.store import Store
from gpuinfer.settings import QUEUES, QueueSettings
from gpuinfer.watcher.notes import DECISIONS, MEMORY_PREFIX
from tests.conftest import need
from tests.host.container import Container
from tests.host.root import missing, root
from tests.services import Process, RedisServer

pytestmark = pytest.mark.host

#: What is restarted, and how often, is as in the shipped unit.
UNIT = """
[Unit]
StartLimitIntervalSec=1h
StartLimitBurst=10
[Service]
Type=notify
NotifyAccess=all
Restart=on-failure
RestartSec=2
ExecStart=/bin/sh -c 'sleep 0.5; test -e /fail-%i && exit 3; systemd-notify --ready; exec sleep infinity'
[Install]
WantedBy=multi-user.target
"""
SETTINGS = {
    "WATCHER_INSTANCES": 4,
    "WATCHER_COOLDOWN_S": 2,
    "WATCHER_COOLDOWN_MAX_S": 2,
    "WATCHER_PROBE_INTERVAL_S": 0.2,
    "WATCHER_ASSUMED_RATE": 1,
    "WATCHER_QUARANTINE_S": 3,
    "WORKER_DEVICE": "cpu",
    "LOG_FORMAT": "json",
}

#: An administrator's command for alerts, in a drop-in.
ALERT = """
[Service]
ExecStart=
ExecStart=/bin/sh -c 'echo "$ALERT_STATE $ALERT_NAME: $ALERT_TEXT; $ALERT_REMEDY"'
StandardOutput=append:/var/log/told
"""


#: NVML as it is for the watcher: the driver is not there before a file says how many GPUs it lists.
NVML = """
import sys
sys.path.append({root!r})
from tests.fake_nvml import FakeNvml
class Late(FakeNvml):
    def nvmlInit(self):
        self.count = int(open({driver!r}).read())
        self.init = None if self.count else self.NVML_ERROR_LIBRARY_NOT_FOUND
        super().nvmlInit()
fake = Late(used_bytes=0)
def __getattr__(name):
    return getattr(fake, name)
"""


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    need(not missing(), missing())
    with Container(root(), name="watched") as booted:
        booted.put("/etc/systemd/system/gpuinfer-worker@.service", UNIT)
        shipped = Path(__file__).parents[2] / "systemd"
        for name in ("gpuinfer-alert@.service", "gpuinfer.slice"):
            booted.put(f"/etc/systemd/system/{name}", (shipped / name).read_text(encoding="utf-8"))
        booted.put("/etc/systemd/system/gpuinfer-alert@.service.d/own.conf", ALERT)
        booted.ok("systemctl daemon-reload")
        yield booted


class Site:
    """A container, a Redis, and a watcher that may be killed and started again."""

    def __init__(self, container: Container, server: RedisServer, folder: Path) -> None:
        self.container, self.server, self.folder = container, server, folder
        self.redis = redis.Redis.from_url(server.url)
        self.watcher: Process | None = None
        self._watchers = 0
        #: True once the workers send heartbeats.
        self.speaks = False

    def watch(self, **more: object) -> Process:
        """Start the watcher."""
        bus = f"unix:path=/proc/{self.container._leader}/root/run/dbus/system_bus_socket"
        chosen = {**SETTINGS, "BROKER_URL": self.server.url, **more}
        env = {f"GPUINFER_{name}": str(value) for name, value in chosen.items()}
        command = [sys.executable, "-m", "gpuinfer", "watcher", "run"]
        env |= {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus, "PYTHONPATH": str(self.folder)}
        # As the unit's StateDirectory= and RuntimeDirectory=.
        env["STATE_DIRECTORY"] = str(self.folder)
        env["RUNTIME_DIRECTORY"] = f"/proc/{self.container._leader}/root/run/gpuinfer/watcher"
        self._watchers += 1  # each has a log of its own: its words are not its predecessor's
        self.watcher = Process(command, self.folder / f"watcher{self._watchers}.log", env=env)
        self.watcher.wait_for_line('"watching"')
        return self.watcher

    def backlog(self, tasks: int) -> None:
        """Let so many tasks wait."""
        self.redis.delete("default")
        if tasks:
            self.redis.lpush("default", *["{}"] * tasks)

    def workers_say(self, *, busy: tuple[int, ...] = ()) -> None:
        """Let all workers beat from now on, and some hold a task."""
        self.speaks = True
        self.beat()
        for number in range(4):
            name = keys.inflight(f"gpu{number}@{socket.gethostname()}")
            self.redis.delete(name)
            if number in busy:
                self.redis.hset(name, mapping={"1": "{}", "1:list": "default"})

    def beat(self) -> None:
        """Write all workers' heartbeats."""
        body = orjson.dumps({"state": "idle", "queues": QUEUES, "models": ["digits"]})
        for number in range(4):
            name = f"gpu{number}@{socket.gethostname()}"
            store = Store(self.redis, name, QUEUES, QueueSettings(), models=("digits",))
            store.register(body, default="digits")

    def states(self) -> list[str]:
        """Return the state of each unit, as systemd has it."""
        units = " ".join(f"gpuinfer-worker@{number}" for number in range(4))
        return self.container.sh(f"systemctl is-active {units}").output.split()

    def until(self, wanted: list[str], timeout_s: float = 120.0) -> None:
        """Wait until the units are in these states."""
        deadline = time.monotonic() + timeout_s
        while (found := self.states()) != wanted:
            assert time.monotonic() < deadline, f"waited for {wanted}, is {found}\n{self.tail()}"
            if self.speaks:
                self.beat()
            time.sleep(0.1)

    def remembers(self, number: int, hold: str) -> None:
        """Wait until the watcher has kept what was done by hand."""
        deadline = time.monotonic() + 120
        while [number, hold] not in (kept := self.holds()):
            assert time.monotonic() < deadline, kept
            time.sleep(0.1)

    def holds(self) -> list[list[object]]:
        """Return what the watcher has kept of hands: instance and what was done."""
        kept: bytes = self.redis.get(MEMORY_PREFIX + socket.gethostname()) or b"{}"  # type: ignore[assignment]
        return [[number, unit["hold"]] for number, _, unit in orjson.loads(kept).get("units", [])]

    def tail(self) -> str:
        """Return what the watcher logged last."""
        return self.watcher.tail() if self.watcher else ""

    def starts(self) -> list[str]:
        """Return which instances were started, as systemd's journal counts it."""
        script = (
            "journalctl --sync; journalctl -b -o cat -u 'gpuinfer-worker@*' | grep -c '^Starting' || true"
        )
        return self.container.ok(script).split()


@pytest.fixture
def site(container: Container, redis_server: RedisServer, tmp_path: Path) -> Iterator[Site]:
    made = Site(container, redis_server, tmp_path)
    yield made
    if made.watcher is not None:
        made.watcher.kill()
    made.redis.close()
    container.ok(
        "systemctl unmask -q --runtime gpuinfer-worker@{1,3}; systemctl stop 'gpuinfer-worker@*'; "
        "systemctl disable -q gpuinfer-worker@{0,1,2,3}; "
        "systemctl reset-failed; rm -f /fail-*"
    )


UP, DOWN = "active", "inactive"


def test_a_burst_starts_four_and_calm_brings_the_floor_back(site: Site) -> None:
    """From the floor to all four at once; and one by one back to the floor."""
    site.workers_say()
    site.watch(WATCHER_FLOOR=1)
    site.until([UP, DOWN, DOWN, DOWN])
    site.backlog(500)
    site.until([UP] * 4)
    site.backlog(0)
    site.until([UP, DOWN, DOWN, DOWN])
    kept = [orjson.loads(text) for text in site.redis.lrange(DECISIONS, 0, -1)]
    stops = [entry for entry in kept if entry["verdict"] == "scale_down"]
    assert [len(entry["actions"]) for entry in stops] == [1, 1, 1]


@pytest.mark.parametrize("after", [0.0, 0.3, 0.8])
def test_killed_in_mid_scale_it_comes_to_the_same_fleet(site: Site, after: float) -> None:
    """SIGKILL at any moment: the next watcher finishes the plan, and nothing is started twice."""
    site.workers_say()
    before = int(site.starts()[0])
    watcher = site.watch()
    site.backlog(500)
    watcher.wait_for_line('"scale_up"')
    time.sleep(after)
    watcher.kill()
    site.watch()
    site.until([UP] * 4)
    time.sleep(1)
    assert int(site.starts()[0]) - before == 4


def test_an_enabled_unit_is_started_and_never_stopped(site: Site) -> None:
    """What an administrator enabled runs, whatever the queue."""
    site.workers_say()
    site.container.ok("systemctl enable -q gpuinfer-worker@3")
    site.watch()
    site.until([DOWN, DOWN, DOWN, UP])
    time.sleep(6)
    assert site.states() == [DOWN, DOWN, DOWN, UP]


def test_a_busy_unit_is_never_stopped(site: Site) -> None:
    """It holds a task for longer than any calm period; once it is done, it is stopped."""
    site.workers_say(busy=(0,))
    site.watch()
    site.backlog(500)
    site.until([UP] * 4)
    site.backlog(0)
    site.until([UP, DOWN, DOWN, DOWN])
    time.sleep(5)
    assert site.states() == [UP, DOWN, DOWN, DOWN]
    site.workers_say()
    site.until([DOWN] * 4)


def test_a_failing_unit_is_quarantined_longer_each_time(site: Site) -> None:
    """systemd would try it ten times; it is stopped after the second. The others serve; the log says why."""
    site.workers_say()
    site.container.ok("touch /fail-1")
    watcher = site.watch()
    site.backlog(500)
    site.until([UP, DOWN, UP, UP])
    assert "starts it again and again" in watcher.wait_for_line("stop gpu1@")
    # After its rest it is tried again, fails again, and rests twice as long.
    deadline = time.monotonic() + 120
    while watcher.text().count("stop gpu1@") < 2:
        assert time.monotonic() < deadline, site.tail()
        time.sleep(0.2)
    site.until([UP, DOWN, UP, UP])
    site.container.ok("rm /fail-1")
    site.until([UP] * 4)


def test_trouble_is_told_once_when_it_begins_and_once_when_it_ends(site: Site) -> None:
    """By the administrator's own command; a watcher that is killed and started again repeats nothing."""
    site.container.ok("mkdir -p /run/gpuinfer/watcher; rm -f /var/log/told")
    site.workers_say()
    site.redis.hset(keys.DEAD, "a", "{}")
    watcher = site.watch()
    site.container.until("grep '^began dead-letters' /var/log/told")
    watcher.kill()
    site.redis.hset(keys.DEAD, "b", "{}")
    watcher = site.watch()
    watcher.wait_for_line('"hold"')
    site.redis.delete(keys.DEAD)
    site.container.until("grep '^ended dead-letters' /var/log/told")
    told = site.container.ok("cat /var/log/told").splitlines()
    assert told[0] == "began dead-letters: 1 task is set aside as dead letters; gpuinfer dead list"
    assert len(told) == 2 and told[1].startswith("ended dead-letters: over after"), told


def test_a_unit_that_fails_at_once_holds_up_no_other(site: Site) -> None:
    """One worker is wanted, and the first in the order is broken: the second serves."""
    site.workers_say()
    site.container.ok("touch /fail-0")
    watcher = site.watch(WATCHER_CEILING=1)
    site.backlog(500)
    site.until([DOWN, UP, DOWN, DOWN])
    began = [line for line in watcher.lines() if "start gpu" in line]
    assert len(began) == 2, began


def test_a_driver_that_comes_later_brings_its_gpus(site: Site) -> None:
    """Without one there is a single instance; the watcher finds four GPUs once NVML lists them."""
    site.workers_say()
    driver = site.folder / "driver"
    driver.write_text("0")
    (site.folder / "pynvml.py").write_text(
        NVML.format(root=str(Path(__file__).parents[2]), driver=str(driver))
    )
    site.watch(WATCHER_INSTANCES=0, WORKER_DEVICE="auto")
    site.backlog(500)
    site.until([UP, DOWN, DOWN, DOWN])
    driver.write_text("4")
    site.until([UP] * 4)


def test_what_an_administrator_does_holds(site: Site) -> None:
    """A stop and a mask hold, over a restart of the watcher too, until a start and an unmask."""
    site.workers_say()
    site.container.ok("systemctl mask -q --runtime gpuinfer-worker@1")
    watcher = site.watch(WATCHER_MANUAL_HOLD_S=1)
    site.backlog(500)
    site.until([UP, DOWN, UP, UP])
    site.container.ok("systemctl stop gpuinfer-worker@2")
    site.remembers(2, "stopped")
    watcher.kill()
    site.container.ok("systemctl unmask -q --runtime gpuinfer-worker@1")
    site.watch(WATCHER_MANUAL_HOLD_S=1)
    site.until([UP, UP, DOWN, UP])
    site.container.ok("systemctl mask -q --runtime --now gpuinfer-worker@3")
    site.until([UP, UP, DOWN, DOWN])
    time.sleep(2)
    assert site.states() == [UP, UP, DOWN, DOWN]
    site.container.ok("systemctl unmask -q --runtime gpuinfer-worker@3; systemctl start gpuinfer-worker@2")
    site.until([UP] * 4)
