# SPDX-License-Identifier: Apache-2.0
"""Two hosts' watchers on one Redis: one plan between them, whoever of them is there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuinfer.queue.fleet import HOSTS, SILENT_S
from tests.host.admin import redis_cli
from tests.host.container import Container
from tests.host.gate import gated
from tests.host.pair import paired

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

WORKERS = "gpuinfer-worker@0 gpuinfer-worker@1"
NOTES = " ".join(
    f"gpuinfer:watcher:{name}" for name in ("hosts", "decisions", "memory:gpu-a", "memory:gpu-b")
)
#: At the assumed rate of 4 a second and a target of 5 s these are work for two workers, whatever was measured
#: before: nothing is remembered. A start that took three times as long as assumed would bring another one.
FOR_TWO = 32
SETTINGS = """
[worker]
device = "cpu"
models = ["slow"]
threads = 1
[watcher]
instances = 2
probe_interval_s = 0.5
assumed_rate = 4.0
assumed_startup_s = 60.0
realtime_target_s = 5.0
cooldown_s = 8.0
cooldown_max_s = 8.0
"""


@pytest.fixture(scope="module")
def hosts(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Container, Container]]:
    """The pair with two instances each, and a model that takes a quarter of a second for a task."""
    model = gated(Path(tmp_path_factory.mktemp("models")) / "slow", seconds=0.25)
    with paired(installed) as pair:
        for host in pair:
            host.copy(model, "/var/lib/gpuinfer/models/")
            settings = host.ok("cat /etc/gpuinfer/gpuinfer.toml")
            broker = settings[settings.index("[broker]") :] if host is pair[1] else ""
            host.put("/etc/gpuinfer/gpuinfer.toml", SETTINGS + broker)
            host.ok("chmod -R a+rX /var/lib/gpuinfer/models && gpuinfer config check")
        yield pair


@pytest.fixture(autouse=True)
def fresh(hosts: tuple[Container, Container]) -> Iterator[None]:
    """Each test begins with two watchers that remember nothing, and leaves no task and no worker."""
    for host in hosts:
        host.link(up=True)
        host.ok(f"systemctl stop gpuinfer-watcher {WORKERS}")
    redis_cli(hosts[0], "del", NOTES, "realtime")
    for host in hosts:
        host.sh("systemctl start gpuinfer-watcher")  # a nested cgroup may still be going away: it tries again
        host.until("systemctl is-active gpuinfer-watcher")
    acquainted(hosts)
    yield
    redis_cli(hosts[0], "del", "realtime")


def acquainted(hosts: tuple[Container, Container]) -> None:
    """Wait until each watcher has told of itself since the other had: it has heard of the other."""
    names = [host.name for host in hosts]
    told: dict[str, set[str]] = {name: set() for name in names}
    deadline = time.monotonic() + 60
    while min(map(len, told.values())) < 3:
        assert time.monotonic() < deadline, told
        now = {name: redis_cli(hosts[0], "hget", HOSTS, name) for name in names}
        for name, body in now.items():
            if all(now.values()):
                told[name].add(body)
        time.sleep(0.2)


def fleet(hosts: tuple[Container, Container]) -> list[str]:
    """Return which workers run, start or drain, in the order in which they are started."""
    found = []
    for host in hosts:
        states = host.sh(f"systemctl is-active {WORKERS}").output.split()
        found += [f"gpu{n}@{host.name}" for n, state in enumerate(states) if state != "inactive"]
    return sorted(found)


def until(hosts: tuple[Container, Container], *wanted: str, timeout_s: float = 180.0) -> None:
    """Wait until these workers run, and no others."""
    deadline = time.monotonic() + timeout_s
    while (found := fleet(hosts)) != list(wanted):
        logs = "\n".join(host.ok("journalctl --no-pager -o cat -n 15 -u gpuinfer-watcher") for host in hosts)
        assert time.monotonic() < deadline, f"waited for {wanted}, is {found}\n{logs}"
        time.sleep(0.2)


def burst(host: Container, count: int) -> None:
    """Submit tasks of a quarter of a second each."""
    host.ok(f"gpuinfer submit --model slow $(printf '[%d.0] ' $(seq {count}))")


def status(host: Container, words: str) -> None:
    """Wait until the watcher's status begins like this."""
    said = "$(systemctl show -P StatusText gpuinfer-watcher)"
    host.until(f'said="{said}"; echo "$said"; [ "${{said#{words}}}" != "$said" ]')


def started(host: Container) -> dict[str, set[str]]:
    """Return which instances each host says to have started, by `gpuinfer watcher explain`."""
    told = json.loads(host.ok("gpuinfer watcher explain --last 500 --json"))["decisions"]
    found: dict[str, set[str]] = {}
    for entry in told:
        starts = {one["instance"] for one in entry["actions"] if one["verb"] == "start"}
        found.setdefault(entry["host"], set()).update(starts)
    return found


def test_two_watchers_start_together_what_one_would(hosts: tuple[Container, Container]) -> None:
    """Work for two is started as two, one a host, and never more; then both go, and nothing is left."""
    burst(hosts[0], FOR_TWO)
    until(hosts, "gpu0@gpu-a", "gpu0@gpu-b")
    seen = set()
    while found := fleet(hosts):
        seen.update(found)
        time.sleep(0.2)
    assert seen == {"gpu0@gpu-a", "gpu0@gpu-b"}
    assert redis_cli(hosts[0], "exists", "gpuinfer:dead", "realtime") == "0"
    assert started(hosts[1]) == {"gpu-a": {"gpu0@gpu-a"}, "gpu-b": {"gpu0@gpu-b"}}


def test_the_other_takes_over_while_one_is_cut_off(hosts: tuple[Container, Container]) -> None:
    """What the lost host would have started, the other starts; the lost one holds, and says why."""
    first, second = hosts
    second.link(up=False)
    status(second, "Redis is away")
    time.sleep(SILENT_S + 5)  # until then its workers might serve
    burst(first, FOR_TWO)
    until(hosts, "gpu0@gpu-a", "gpu1@gpu-a")
    status(first, "0 waiting,")


def test_they_agree_again_when_the_link_is_back(hosts: tuple[Container, Container]) -> None:
    """Both take part in the next burst, as before; nobody has been refused anything."""
    first, second = hosts
    second.link(up=False)
    status(second, "Redis is away")
    time.sleep(SILENT_S + 5)
    second.link(up=True)
    status(second, "0 waiting,")
    acquainted(hosts)
    burst(first, FOR_TWO)
    until(hosts, "gpu0@gpu-a", "gpu0@gpu-b")
    assert "watcher" not in redis_cli(first, "acl", "log")
