# SPDX-License-Identifier: Apache-2.0
"""A second host that works for the first one's queue, over TLS, as README and man page tell it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host.admin import API, logged, predict, properties, result, start_worker
from tests.host.container import Container
from tests.host.gate import gated, let_go, shut
from tests.host.pair import paired

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts(installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Container, Container]]:
    """The pair, their watchers off; their workers serve the digits, and a model with a gate."""
    folder = gated(tmp_path_factory.mktemp("models") / "gated")
    with paired(installed) as pair:
        for host in pair:
            host.copy(folder, "/var/lib/gpuinfer/models/")
            host.put("/etc/gpuinfer/worker@0.env", "GPUINFER_WORKER_MODELS=digits,gated\n")
            host.ok("chmod -R a+rX /var/lib/gpuinfer/models")
        yield pair


def test_two_containers_share_no_control_group(hosts: tuple[Container, Container]) -> None:
    """Of a process that belongs to another container, a container sees the number 0 in its unit's group."""
    for host in hosts:
        assert host.ok("cat /sys/fs/cgroup/gpuinfer.slice/gpuinfer-api.service/cgroup.procs").split()
        assert not host.ok("find /sys/fs/cgroup -name cgroup.procs -exec grep -Hx 0 {} + | cat")


def test_the_second_host_has_no_redis_of_its_own(hosts: tuple[Container, Container]) -> None:
    """Where broker.url names another host, gpuinfer-redis.service is skipped, which is no failure."""
    _, second = hosts
    second.until("systemctl is-active gpuinfer-api")
    state = properties(second, "gpuinfer-redis", "ActiveState", "Result")
    assert state == {"ActiveState": "inactive", "Result": "exec-condition"}
    assert "gpuinfer" not in second.ok("systemctl --failed --no-legend --no-pager | cat")
    second.ok("gpuinfer doctor config redis")


def test_the_second_hosts_worker_does_the_first_ones_work(hosts: tuple[Container, Container]) -> None:
    """A task posted on one host is computed on the other, and its result read on either."""
    first, second = hosts
    start_worker(second)
    task_id = predict(first)
    for host in (first, second):
        done = result(host, task_id)
        assert (done["status"], done["worker"]) == ("completed", "gpu0@gpu-b")
    assert [entry["_HOSTNAME"] for entry in logged(second, f"TASK_ID={task_id}", "ACTION=batch_done")] == [
        "gpu-b"
    ]


def test_a_host_that_is_cut_off_comes_back_by_itself(hosts: tuple[Container, Container]) -> None:
    """Without the network the second host waits and says so; with it, it works on. Nothing is lost."""
    first, second = hosts
    second.link(up=False)
    ids = [predict(first) for _ in range(5)]
    second.until("systemctl status gpuinfer-worker@0 --no-pager | grep 'waiting for Redis'")
    assert properties(second, "gpuinfer-worker@0", "ActiveState")["ActiveState"] == "active"
    assert result(first, ids[0], wait=0)["status"] == "queued"
    second.link(up=True)
    assert {result(first, task_id)["status"] for task_id in ids} == {"completed"}


def test_both_hosts_share_the_work(hosts: tuple[Container, Container]) -> None:
    """With a worker on each, both take part in a burst, each under its own name."""
    first, _ = hosts
    start_worker(first)
    for host in hosts:
        shut(host)
    ids = first.ok("gpuinfer submit --model gated $(printf '[%d.0] ' $(seq 8))").split()
    running = " && ".join(f'grep -q \'"worker": *"gpu0@{host.name}"\' /tmp/states' for host in hosts)
    ask = f"for id in {' '.join(ids)}; do curl -s {API}/result/$id; echo; done >/tmp/states"
    first.until(f"{ask}; {running}", what="a task for each worker")
    for host in hosts:
        let_go(host)
    assert {result(first, task_id)["worker"] for task_id in ids} == {"gpu0@gpu-a", "gpu0@gpu-b"}
    first.until("gpuinfer doctor work | grep gpu0@gpu-b")


def test_keys_and_passwords_are_where_they_are_needed(hosts: tuple[Container, Container]) -> None:
    """A worker cannot read Redis's private key; the second host has no password of the administrator."""
    first, second = hosts
    as_worker = "setpriv --reuid gpuinfer-worker --regid gpuinfer-worker --init-groups"
    first.ok(f"{as_worker} cat /etc/gpuinfer/tls/redis.crt")
    assert first.sh(f"{as_worker} cat /etc/gpuinfer/tls/redis.key").code
    second.ok("dpkg-reconfigure gpuinfer; ! test -e /etc/gpuinfer/credentials/admin")
    assert "4 passwords" in second.ok("gpuinfer doctor config")
    second.ok("set -e; gpuinfer watcher explain; gpuinfer queue status")
    assert "shape_mismatch" in second.sh("gpuinfer submit --wait '[1]'").output
