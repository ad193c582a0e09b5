# SPDX-License-Identifier: Apache-2.0
"""The watcher as installed, with real workers: its own user and sandbox, polkit's rule, Redis's ACL."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer.queue import keys
from tests.host.admin import (
    API,
    STARTED,
    STOPPING,
    active,
    journal,
    main_pid,
    predict,
    properties,
    redis_cli,
    result,
)
from tests.host.container import Container
from tests.host.gate import gated, let_go, shut
from tests.models_for_tests import sleeper
from tests.workers import wait_until

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

WATCHER = "gpuinfer-watcher"
MEMORY = "gpuinfer:watcher:memory:gpuhost"
WORKERS = " ".join(f"gpuinfer-worker@{number}" for number in range(4))
UP, DOWN = "active", "inactive"
#: How long a manual start is respected, and how long a fleet may take to come or go: four load at a time.
HOLD_S, FLEET_S = 5.0, 300.0
SETTINGS = f"""
[worker]
device = "cpu"
models = ["slow", "stuck"]
threads = 1
[watcher]
instances = 4
probe_interval_s = 0.5
assumed_rate = 1.0
cooldown_s = 2.0
cooldown_max_s = 2.0
manual_hold_s = {HOLD_S}
"""


@pytest.fixture(scope="module", autouse=True)
def watched(host: Container, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four instances on the CPU, none enabled; a model that takes a quarter of a second, one that hangs."""
    folder = Path(tmp_path_factory.mktemp("models"))
    limits = {"soft_time_limit_s": 0.1, "hard_time_limit_s": 0.2}
    for model in (
        gated(folder / "slow", seconds=0.25),
        sleeper(folder / "stuck", seconds=3600, max_batch_size=1, **limits),
    ):
        host.copy(model, "/var/lib/gpuinfer/models/")
    host.put("/etc/gpuinfer/gpuinfer.toml", SETTINGS)
    host.ok("chmod -R a+rX /var/lib/gpuinfer/models && gpuinfer config check")
    host.ok("systemctl restart gpuinfer.target")
    active(host, "gpuinfer-watcher", "gpuinfer-api", "gpuinfer-redis")
    wait_until(lambda: redis_cli(host, "zscore", keys.CATALOGUE, "stuck"), timeout=60)


@pytest.fixture(autouse=True)
def quiet(host: Container) -> Iterator[None]:
    """Each test begins and ends with no worker, no task and nothing that is remembered of a manual act."""
    yield
    let_go(host)
    host.ok(f"systemctl disable -q {WORKERS}; systemctl stop {WATCHER} {WORKERS}; systemctl reset-failed")
    redis_cli(host, "del", MEMORY, "realtime")
    host.ok(f"systemctl start {WATCHER}")


def burst(host: Container, count: int, model: str = "slow") -> list[str]:
    """Submit tasks, of a quarter of a second each unless they hang; return their ids."""
    ids = host.ok(f"gpuinfer submit --model {model} $(printf '[%d.0] ' $(seq {count}))").split()
    assert len(ids) == count
    return ids


def states(host: Container) -> list[str]:
    """Return the state of each instance as systemd has it."""
    return host.sh(f"systemctl is-active {WORKERS}").output.split()


def until(host: Container, *wanted: str, timeout_s: float = FLEET_S) -> None:
    """Wait until the instances are in these states."""
    deadline = time.monotonic() + timeout_s
    while (found := states(host)) != list(wanted):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited for {wanted}, is {found}\n{log(host)}")
        time.sleep(0.2)


def log(host: Container) -> str:
    """Return what the watcher said last."""
    return host.ok(f"journalctl --no-pager -o cat -n 40 -u {WATCHER}")


def starts(host: Container) -> int:
    """Return how many jobs have started a worker since the boot."""
    entries = journal(host, "-b", "_PID=1", "JOB_TYPE=start", "JOB_RESULT=done")
    return sum(entry["UNIT"].startswith("gpuinfer-worker@") for entry in entries)


def all_completed(host: Container, ids: list[str]) -> None:
    """Hold that each task has its result, and that nothing is left of any."""
    ask = f"curl -s --retry 20 --retry-connrefused '{API}/result/'$id'?wait=60'"
    look = f'{ask} | grep -o \'"status": *"completed"\' && break'  # a worker may have to come first
    done = host.ok(f"for id in {' '.join(ids)}; do for n in 1 2 3 4 5; do {look}; done; done", timeout=900)
    assert len(done.splitlines()) == len(ids), done
    assert redis_cli(host, "exists", "gpuinfer:dead", "realtime", "default", "batch") == "0"


def explained(host: Container) -> list[dict[str, Any]]:
    """Return what `gpuinfer watcher explain` tells, the newest decision first."""
    told: list[dict[str, Any]] = json.loads(host.ok("gpuinfer watcher explain --last 500 --json"))[
        "decisions"
    ]
    return told


def ups(host: Container) -> list[dict[str, Any]]:
    """Return the decisions to start workers, the newest first."""
    return [one for one in explained(host) if one["verdict"] == "scale_up"]


def holds(host: Container) -> list[str]:
    """Return what the watcher takes for an administrator's wish."""
    kept = json.loads(redis_cli(host, "--raw", "get", MEMORY))
    return [unit["hold"] for _, _, unit in kept["units"] if unit["hold"]]


def test_a_request_is_served_though_no_worker_runs(host: Container) -> None:
    """From zero: one worker for a single request. When it crashes, that is nobody's wish."""
    assert states(host) == [DOWN] * 4
    shut(host)  # an idle worker would be stopped again
    tasks = [predict(host, '{"inputs": [1.0]}')]
    until(host, UP, DOWN, DOWN, DOWN)
    # As the watcher's process, with its groups: the lock can be opened, and is held (1, not 66).
    groups = f"$(sed -n 's/^Groups://p' /proc/{main_pid(host, WATCHER)}/status | xargs | tr ' ' ,)"
    who = f"setpriv --reuid {WATCHER} --regid {WATCHER} --groups {groups}"
    looked = host.sh(f"{who} flock -n -s /run/gpuinfer/worker/gpu0@gpuhost.lock true")
    assert looked.code == 1, looked.output
    host.until(f"curl -s {API}/result/{tasks[0]} | grep -q running")
    before = main_pid(host, "gpuinfer-worker@0")
    host.ok(f"kill -9 {before}")
    host.until(f"[ $(systemctl show -P MainPID gpuinfer-worker@0) != {before} ]")
    tasks.append(predict(host, '{"inputs": [1.0]}'))
    let_go(host)
    all_completed(host, tasks)
    assert holds(host) == []


def test_a_burst_brings_all_and_calm_brings_the_floor_back(host: Container) -> None:
    """Four for a burst; an enabled one stays when the others go, drained. Nothing is lost; all is told."""
    host.ok("systemctl enable -q gpuinfer-worker@1")
    until(host, DOWN, UP, DOWN, DOWN)
    shut(host)
    ids = burst(host, 40)
    until(host, *[UP] * 4)
    let_go(host)
    all_completed(host, ids)
    until(host, DOWN, UP, DOWN, DOWN)
    time.sleep(2)
    assert states(host) == [DOWN, UP, DOWN, DOWN]
    for number in (0, 2, 3):
        assert properties(host, f"gpuinfer-worker@{number}", "Result")["Result"] == "success"
    up = next(one for one in explained(host) if len(one["actions"]) == 3)
    assert {one["instance"] for one in up["actions"]} == {f"gpu{number}@gpuhost" for number in (0, 2, 3)}
    assert up["inputs"]["waiting"] > 0
    assert f"{up['inputs']['waiting']} tasks wait" in up["why"]
    assert "start gpu0@gpuhost" in host.ok("gpuinfer watcher explain")
    downs = [one for one in explained(host) if one["verdict"] == "scale_down"]
    assert {len(one["actions"]) for one in downs} == {1}
    said = [entry for entry in journal(host, "-b", "-u", WATCHER) if entry.get("ACTION") == "scale_up"]
    assert any(up["why"] in entry["MESSAGE"] for entry in said)


def test_killed_in_mid_scale_it_comes_to_the_same_fleet(host: Container) -> None:
    """SIGKILL between command and ready: the next life finishes the plan, and starts nothing twice."""
    before, pid = starts(host), main_pid(host, WATCHER)
    shut(host)
    ids = burst(host, 40)
    host.until(f"systemctl show -P ActiveState {WORKERS} | grep -q activating")
    host.ok(f"kill -9 {pid}")
    until(host, *[UP] * 4)
    active(host, WATCHER)
    let_go(host)
    all_completed(host, ids)
    assert main_pid(host, WATCHER) != pid
    assert starts(host) - before == 4
    assert holds(host) == []


def test_a_manual_start_and_stop_are_respected(host: Container) -> None:
    """What root starts stays a while though nothing waits; what root stops stays so until root starts it."""
    host.ok("systemctl start gpuinfer-worker@3")
    until(host, *[DOWN] * 4)
    # A unit that has stopped is forgotten, with its times.
    told = journal(host, "-b", "_PID=1", "UNIT=gpuinfer-worker@3.service")
    at = {entry.get("MESSAGE_ID"): int(entry["__MONOTONIC_TIMESTAMP"]) for entry in told}
    assert at[STOPPING] - at[STARTED] >= HOLD_S * 1e6, log(host)
    shut(host)
    burst(host, 500)
    until(host, *[UP] * 4)
    host.ok("systemctl stop --no-block gpuinfer-worker@2")
    let_go(host)
    until(host, UP, UP, DOWN, UP)
    shut(host)
    time.sleep(1.5 * HOLD_S)
    assert states(host) == [UP, UP, DOWN, UP], log(host)
    host.ok("systemctl start gpuinfer-worker@2")


def test_a_stop_of_all_workers_lasts_until_their_target_is_started(host: Container) -> None:
    """Over all that makes systemd forget it or the package start it; no single worker is meant."""
    shut(host)
    ids = burst(host, 100)
    until(host, *[UP] * 4)
    let_go(host)
    host.ok("systemctl stop gpuinfer-workers.target")
    try:
        until(host, *[DOWN] * 4)
        host.until("gpuinfer watcher explain | grep '^now.*gpuinfer-workers.target is stopped'", timeout=60)
        host.ok("systemctl disable -q gpuinfer-workers.target; systemctl daemon-reexec")
        host.ok(f"systemctl restart {WATCHER}; dpkg-reconfigure gpuinfer")
        told = f"journalctl -o cat _PID={main_pid(host, WATCHER)}"
        host.until(f"{told} | grep 'systemctl start gpuinfer-workers.target'", timeout=60)
        assert (states(host), holds(host)) == ([DOWN] * 4, [])
    finally:
        host.ok("systemctl enable -q gpuinfer-workers.target; systemctl start gpuinfer-workers.target")
    all_completed(host, ids)
    assert holds(host) == []


def test_slow_requests_do_not_stop_the_only_worker(host: Container) -> None:
    """Each ends its process at the hard limit, more often than a crash loop may (here 3 times)."""
    only = "/etc/systemd/system/gpuinfer-worker@0.service.d/test.conf"
    # The second command of the stop leaves time for a probe after the count of restarts was reset.
    host.put(only, "[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=0.1\nExecStopPost=/bin/sleep 1\n")
    host.ok("systemctl daemon-reload; systemctl mask -q --runtime gpuinfer-worker@{1,2,3}")
    try:
        ended = [result(host, task_id) for task_id in burst(host, 4, "stuck")]
        assert [one["error"]["code"] for one in ended] == ["time_limit_exceeded"] * 4
        all_completed(host, burst(host, 1))
        told = json.loads(redis_cli(host, "--raw", "get", MEMORY))["units"]
        assert {unit["failures"] for _, _, unit in told} == {0}
        assert "quarantine" not in host.ok("gpuinfer watcher explain --last 20")
    finally:
        host.ok(
            f"rm {only}; systemctl unmask -q --runtime gpuinfer-worker@{{1,2,3}}; systemctl daemon-reload"
        )


def test_a_reboot_is_no_manual_stop(host: Container) -> None:
    """What ran before the boot is started again at once, as the queue needs it; nothing is lost."""
    shut(host)
    ids = burst(host, 200)
    until(host, *[UP] * 4)
    time.sleep(1)
    before = len(ups(host))
    let_go(host)
    host.reboot()
    all_completed(host, ids)
    assert holds(host) == []
    since = ups(host)[: -before or None]
    assert since, "all was done before the boot"
    up = since[-1]
    assert (up["inputs"]["active"], up["inputs"]["possible"]) == (0, 4)


def test_it_uses_no_right_it_does_not_have(host: Container) -> None:
    """Redis has refused it nothing, nor has polkit; its watchdog is fed, its status is true."""
    assert "watcher" not in redis_cli(host, "acl", "log")
    said = journal(host, "-u", WATCHER)
    bad = {"action_failed", "probe_failed", "units_away", "notes_not_kept"}
    found = [(entry["ACTION"], entry.get("REASON", "")) for entry in said if entry.get("ACTION") in bad]
    # systemd was executed again meanwhile, and may not have answered one probe.
    assert [pair for pair in found if "systemd does not answer" not in pair[1]] == []
    status = "^0 waiting, 0 of 4 workers of this host run: no worker is desired"
    host.until(f"systemctl show -P StatusText {WATCHER} | grep '{status}'")
    state = properties(host, WATCHER, "WatchdogUSec", "WatchdogTimestampMonotonic", "User")
    assert (state["WatchdogUSec"], state["User"]) == ("1min", WATCHER)
    fed = "WatchdogTimestampMonotonic"
    host.until(f"[ $(systemctl show -P {fed} {WATCHER}) -gt {state[fed]} ]")
