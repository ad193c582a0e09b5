# SPDX-License-Identifier: Apache-2.0
"""Two hosts' watchers on one Redis: one plan between them, whoever of them is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuinfer.watcher.probe import SILENT_S
from tests.host.admin import redis_cli
from tests.host.container import Container
from tests.host.pair import paired
from tests.models_for_tests import sleeper

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

WORKERS = "gpuinfer-worker@0 gpuinfer-worker@1"
SETTINGS = """
[models]
default = "slow"
[worker]
device = "cpu"
models = ["slow"]
threads = 1
[watcher]
instances = 2
probe_interval_s = 0.5
assumed_rate = 4.0
assumed_startup_s = 4.0
realtime_target_s = 5.0
calm_s = 4.0
calm_max_s = 4.0
"""


@pytest.fixture(scope="module")
def hosts(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Container, Container]]:
    """The pair with two instances each, and a model that takes a quarter of a second for a task."""
    model = sleeper(Path(tmp_path_factory.mktemp("models")) / "slow", seconds=0.25, max_batch_size=1)
    with paired(installed) as pair:
        for host in pair:
            host.copy(model, "/var/lib/gpuinfer/models/")
            settings = host.ok("cat /etc/gpuinfer/gpuinfer.toml")
            broker = settings[settings.index("[broker]") :] if host is pair[1] else ""
            host.put("/etc/gpuinfer/gpuinfer.toml", SETTINGS + broker)
            host.ok("chmod -R a+rX /var/lib/gpuinfer/models && gpuinfer config check")
            host.ok("systemctl start gpuinfer-watcher")
        yield pair


def fleet(hosts: tuple[Container, Container]) -> list[str]:
    """Return which workers run, start or drain, in the order in which they are started."""
    found = []
    for host in hosts:
        states = host.sh(f"systemctl is-active {WORKERS}").output.split()
        found += [f"gpu{n}@{host.name}" for n, state in enumerate(states) if state != "inactive"]
    return sorted(found)


def until(hosts: tuple[Container, Container], *wanted: str, timeout_s: float = 40.0) -> None:
    """Wait until these workers run, and no others."""
    deadline = time.monotonic() + timeout_s
    while (found := fleet(hosts)) != list(wanted):
        logs = "\n".join(host.ok("journalctl --no-pager -o cat -n 15 -u gpuinfer-watcher") for host in hosts)
        assert time.monotonic() < deadline, f"waited for {wanted}, is {found}\n{logs}"
        time.sleep(0.2)


def burst(host: Container, count: int) -> None:
    """Submit tasks of a quarter of a second each."""
    host.ok(f"gpuinfer submit --model slow $(printf '[%d.0] ' $(seq {count}))")


def drained(hosts: tuple[Container, Container]) -> None:
    """Wait until no worker runs any more; hold that nothing is left."""
    until(hosts)
    assert redis_cli(hosts[0], "exists", "gpuinfer:dead", "realtime") == "0"


def test_two_watchers_start_together_what_one_would(hosts: tuple[Container, Container]) -> None:
    """Work for two is started as two, one a host, and never more; then both go, and nothing is left."""
    burst(hosts[0], 32)
    until(hosts, "gpu0@gpu-a", "gpu0@gpu-b")
    seen = set()
    while found := fleet(hosts):
        seen.update(found)
        time.sleep(0.2)
    assert seen == {"gpu0@gpu-a", "gpu0@gpu-b"}
    drained(hosts)
    verdicts = hosts[1].ok("gpuinfer watcher explain")
    assert "start gpu0@gpu-a" in verdicts
    assert "start gpu0@gpu-b" in verdicts


def test_the_other_takes_over_while_one_is_cut_off(hosts: tuple[Container, Container]) -> None:
    """What the lost host would have started, the other starts; the lost one holds, and says why."""
    first, second = hosts
    second.link(up=False)
    second.until("systemctl status gpuinfer-watcher --no-pager | grep 'Status: .*Redis is away'", timeout=60)
    time.sleep(SILENT_S)  # until then its workers might serve
    burst(first, 32)
    until(hosts, "gpu0@gpu-a", "gpu1@gpu-a")
    first.until("systemctl status gpuinfer-watcher --no-pager | grep 'Status: .*0 waiting'", timeout=60)
    first.ok(f"systemctl stop gpuinfer-watcher {WORKERS} && systemctl start gpuinfer-watcher")


def test_they_agree_again_when_the_link_is_back(hosts: tuple[Container, Container]) -> None:
    """Both take part in the next burst, as before; nobody has been refused anything."""
    first, second = hosts
    second.link(up=True)
    second.until("systemctl status gpuinfer-watcher --no-pager | grep 'Status: .*0 waiting'", timeout=60)
    burst(first, 32)
    until(hosts, "gpu0@gpu-a", "gpu0@gpu-b")
    assert "watcher" not in redis_cli(first, "acl", "log")
