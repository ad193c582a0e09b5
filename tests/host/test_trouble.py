# SPDX-License-Identifier: Apache-2.0
"""Everything that can die is killed, hung or filled up, and nothing that was accepted is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.host.admin import (
    TWO,
    actions,
    active,
    journal,
    logged,
    main_pid,
    predict,
    properties,
    ready,
    result,
    start_worker,
)
from tests.host.container import Container
from tests.host.gate import gated, let_go, shut
from tests.models_for_tests import sleeper

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]
WORKER = "gpuinfer-worker@0"


@pytest.fixture(scope="module", autouse=True)
def workers(host: Container, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A worker that serves the digits, a model that takes 15 s, one that hangs for good, and one with a gate.

    The watchdog looks every 6 s, not every 30, so that the tests need not wait for it.
    """
    folder = Path(tmp_path_factory.mktemp("models"))
    sleeper(folder / "slow", seconds=15, soft_time_limit_s=100, hard_time_limit_s=110)
    sleeper(folder / "hangs", seconds=3600, soft_time_limit_s=3, hard_time_limit_s=4)
    gated(folder / "gated")
    for name in ("slow", "hangs", "gated"):
        host.copy(folder / name, "/var/lib/gpuinfer/models/")
    host.put("/etc/gpuinfer/worker@0.env", "GPUINFER_WORKER_MODELS=digits,slow,hangs,gated\n")
    host.ok("systemctl stop gpuinfer-watcher; chmod -R a+rX /var/lib/gpuinfer/models")
    host.put(f"/etc/systemd/system/{WORKER}.service.d/test.conf", "[Service]\nWatchdogSec=6\n")
    host.ok("systemctl daemon-reload")
    start_worker(host)


def burst(host: Container, count: int) -> list[str]:
    """Submit many tasks at once; return their ids."""
    ids = host.ok(f"gpuinfer submit $(for i in $(seq {count}); do echo '{TWO}'; done)").split()
    assert len(ids) == count
    return ids


def all_completed(host: Container, ids: list[str]) -> None:
    """Hold that each task has its result."""
    for task_id in ids:
        state = result(host, task_id)
        assert state["status"] == "completed", state


def test_a_killed_workers_task_is_done_by_its_next_process(host: Container) -> None:
    """SIGKILL in the middle of a batch: the task is back in the queue at once, and is done."""
    task_id = predict(host, '{"inputs": [1.0], "model": "slow"}')
    host.until(f"curl -s http://127.0.0.1:8080/result/{task_id} | grep -q running")
    before = main_pid(host, WORKER)
    host.ok(f"kill -9 {before}")
    host.until("journalctl -u gpuinfer-restore@0 | grep -q Finished")
    host.until(f"[ $(systemctl show -P MainPID {WORKER}) -ne {before} ] && systemctl is-active {WORKER}")
    told = actions(journal(host, f"TASK_ID={task_id}"))
    assert "restored" in told
    all_completed(host, [task_id])
    # It took 15 s, and the watchdog looks every 6: a long batch that may be long is left alone.
    assert properties(host, WORKER, "NRestarts")["NRestarts"] == "1"


def test_a_hung_model_ends_at_its_limit_and_the_worker_comes_back(host: Container) -> None:
    """A model that hangs costs its own task, which fails with its reason; the next task is served."""
    before = main_pid(host, WORKER)
    task_id = predict(host, '{"inputs": [1.0], "model": "hangs"}')
    state = result(host, task_id)
    assert (state["status"], state["error"]["code"]) == ("failed", "time_limit_exceeded"), state
    host.until(f"[ $(systemctl show -P MainPID {WORKER}) -ne {before} ] && systemctl is-active {WORKER}")
    all_completed(host, [predict(host)])


def test_a_stopped_process_is_restarted_by_the_watchdog(host: Container) -> None:
    """A worker whose event loop stands still is ended, says where it stood, and starts anew."""
    host.ok(f"systemctl reset-failed {WORKER}; kill -STOP {main_pid(host, WORKER)}")
    ids = burst(host, 3)
    host.until(f"journalctl -u {WORKER} | grep \"Failed with result 'watchdog'\"")
    active(host, WORKER)
    assert "Fatal Python error: Aborted" in host.ok(f"journalctl --no-pager -u {WORKER}")
    all_completed(host, ids)


def test_redis_is_killed_after_the_fsync_and_nothing_is_lost(host: Container) -> None:
    """It comes back with what it had, and workers and API find it again by themselves."""
    host.ok(f"systemctl stop {WORKER}")
    ids = burst(host, 300)
    host.ok("sleep 1.2")  # everysec: what is older than a second is on the disk, whatever dies
    before = main_pid(host, "gpuinfer-redis")
    host.ok(f"kill -9 {before}")
    host.until(
        f"[ $(systemctl show -P MainPID gpuinfer-redis) -ne {before} ] && systemctl is-active gpuinfer-redis"
    )
    start_worker(host)
    before = main_pid(host, "gpuinfer-redis")
    host.ok(f"kill -9 {before}")
    all_completed(host, ids[:5] + ids[-5:])
    host.until("gpuinfer queue status --json | grep -q '\"waiting\": *0'")
    worker = main_pid(host, WORKER)
    all_completed(host, [predict(host)])
    assert main_pid(host, WORKER) == worker


def test_the_api_is_killed_and_answers_again(host: Container) -> None:
    """SIGKILL of the API: what it took is done, and the next request is answered by its next process."""
    ids = [predict(host) for _ in range(3)]
    host.ok(f"kill -9 {main_pid(host, 'gpuinfer-api')}")
    all_completed(host, [*ids, predict(host)])


def test_two_processes_of_the_api(host: Container) -> None:
    """READY once both serve; one that is killed or hangs is started again, and a restart refuses nobody.

    Metrics have an address of their own, which all processes serve.
    """
    drop_in = "/etc/systemd/system/gpuinfer-api.service.d/two.conf"
    metrics = "GPUINFER_METRICS_LISTEN=127.0.0.1:9108"
    host.put(drop_in, f"[Service]\nEnvironment=GPUINFER_API_PROCESSES=2 {metrics}\nWatchdogSec=6\n")
    host.ok("systemctl daemon-reload; systemctl restart gpuinfer-api")
    state = properties(host, "gpuinfer-api", "StatusText", "NRestarts")
    assert state["StatusText"].startswith("2 processes listening on http://127.0.0.1:8080, unix:/run/")
    page = host.ok("curl -sf http://127.0.0.1:9108/metrics")
    for line in ("gpuinfer_redis_up 1.0", 'gpuinfer_model_workers{model="digits"} 1.0', "_disk_free_bytes{"):
        assert line in page
    assert re.search(r'gpuinfer_redis_durability_info\{appendfsync="(always|everysec)"\} 1.0', page), page
    parent = main_pid(host, "gpuinfer-api")
    for how in ("KILL", "STOP"):
        one, other = host.ok(f"pgrep -P {parent}").split()
        host.ok(f"kill -{how} {one}")
        host.until(f"[ $(pgrep -P {parent} | grep -vwc -e {one} -e {other}) = 1 ] && ! kill -0 {one}")
        all_completed(host, [predict(host)])
    logged(host, f"_PID={parent}", "ACTION=process_hangs")
    told = actions(journal(host, f"_PID={parent}"))
    assert (told.count("process_crashed"), told.count("process_hangs")) == (2, 1), told
    assert main_pid(host, "gpuinfer-api") == parent
    asked = "curl -s -o /dev/null -w '%{http_code}\\n' http://127.0.0.1:8080/health/live; sleep 0.02"
    said = host.ok(
        "(sleep 1; for i in 1 2; do systemctl restart gpuinfer-api; done) & "
        f'seq 300 | xargs -P 4 -n 1 sh -c "{asked}" | sort | uniq -c; wait',
        timeout=200,
    )
    assert said.split() == ["300", "200"], said
    # The parent's own silence is systemd's to end; its processes go with it.
    parent = main_pid(host, "gpuinfer-api")
    host.ok(f"kill -STOP {parent}")
    host.until(
        f"[ $(systemctl show -P MainPID gpuinfer-api) != {parent} ] && systemctl is-active gpuinfer-api"
    )
    assert len(host.ok("pgrep -f 'gpuinfer api'").split()) == 3
    host.put(drop_in, "[Service]\nEnvironment=GPUINFER_METRICS_LISTEN=unix:/run/gpuinfer/api/metrics.sock\n")
    host.ok("systemctl daemon-reload; systemctl restart gpuinfer-api")
    page = host.ok("curl -sf --unix-socket /run/gpuinfer/api/metrics.sock http://metrics/metrics")
    assert "gpuinfer_redis_up 1.0" in page
    host.ok(f"rm {drop_in}; systemctl daemon-reload; systemctl restart gpuinfer-api")


def test_wrong_settings_take_no_socket_down(host: Container) -> None:
    """The API answers 503 with what is wrong, and serves as soon as the file is right, without a start."""
    file = "/etc/gpuinfer/gpuinfer.toml"
    host.ok(f"cp -p {file} /root/right.toml; echo '[api' >>{file}; systemctl restart gpuinfer-api")
    refused = host.ok("curl -si http://127.0.0.1:8080/models")
    assert "HTTP/1.1 503" in refused
    assert "is not valid TOML" in refused
    assert refused.endswith("\n")
    assert "answers 503: " in host.ok("systemctl status --no-pager gpuinfer-api")
    told = journal(host, "-b", "_SYSTEMD_UNIT=gpuinfer-api.service", "-p", "err")
    assert any("is not valid TOML" in str(line) for line in told)
    host.ok(f"cp -p /root/right.toml {file}")
    host.until("curl -sf http://127.0.0.1:8080/health/live", what="the API with the right settings")


def test_an_api_that_cannot_start_ends_in_failed(host: Container) -> None:
    """A wrong call and a waiting client: it is not started for ever; once corrected, one start suffices."""
    host.put(
        "/etc/systemd/system/gpuinfer-api.service.d/wrong.conf",
        "[Service]\nExecStart=\nExecStart=/usr/bin/gpuinfer api --nosuch\n",
    )
    host.ok("systemctl daemon-reload; ! systemctl restart gpuinfer-api 2>&1")
    host.sh("curl -s -m 60 http://127.0.0.1:8080/health/live")
    host.until("systemctl is-failed -q gpuinfer-api.socket")
    host.ok("rm -r /etc/systemd/system/gpuinfer-api.service.d; systemctl daemon-reload")
    host.ok("systemctl start gpuinfer-api; curl -sf http://127.0.0.1:8080/health/live")


def test_a_stop_drains(host: Container) -> None:
    """`systemctl stop` finishes the batch that runs and hands the rest back; nobody is killed."""
    shut(host)
    running = predict(host, '{"inputs": [1.0], "model": "gated"}')
    host.until(f"curl -s http://127.0.0.1:8080/result/{running} | grep -q running")
    waiting = burst(host, 20)
    host.ok(f"systemctl stop --no-block {WORKER}")
    host.until(f"[ $(systemctl show -P ActiveState {WORKER}) = deactivating ]")
    let_go(host)
    host.until(f"[ $(systemctl show -P ActiveState {WORKER}) = inactive ]")
    assert result(host, running, wait=1)["status"] == "completed"
    assert {result(host, task_id, wait=0)["status"] for task_id in waiting} == {"queued"}
    assert properties(host, WORKER, "Result")["Result"] == "success"
    start_worker(host)
    all_completed(host, waiting)


def test_a_worker_that_cannot_stay_up_ends_in_failed(host: Container) -> None:
    """A crash loop ends, in a state that `systemctl --failed` lists; its GPU's neighbours go on."""
    host.ok(f"systemctl reset-failed {WORKER}")
    host.until(
        f"pid=$(systemctl show -P MainPID {WORKER}); [ $pid = 0 ] || kill -9 $pid;"
        f" systemctl is-failed -q {WORKER} && systemctl show -P Result {WORKER} | grep -q start-limit-hit"
        f" || systemctl show -P SubState {WORKER} | grep -q '^failed'",
        timeout=400,
    )
    assert WORKER in host.sh("systemctl --failed --no-pager").output
    start_worker(host)
    all_completed(host, [predict(host)])


def test_the_doctor_tells_how_the_last_start_ended(host: Container) -> None:
    """Wrong settings, which are corrected before another start; then SIGKILL, and not that earlier error."""
    own, drop_in = "/etc/gpuinfer/worker@0.env", f"/run/systemd/system/{WORKER}.service.d/once.conf"
    host.put(drop_in, "[Service]\nRestart=no\n")
    host.ok(f"systemctl daemon-reload; systemctl stop {WORKER}; cp {own} /root/own.env")
    host.ok(f"echo GPUINFER_WORKER_THREADS=many >> {own}")
    host.ok(f"systemctl reset-failed {WORKER} 2>/dev/null; systemctl start {WORKER}; true")
    host.until(f"systemctl is-failed {WORKER}")
    said = host.sh("gpuinfer doctor units.workers").output
    assert f"{WORKER}.service failed (exit-code): " in said
    assert "worker.threads" in said
    assert f"editor {own} && gpuinfer config check && systemctl reset-failed" in said
    host.ok(f"mv /root/own.env {own}")
    start_worker(host)
    ready(host, WORKER)
    host.ok(f"kill -9 {main_pid(host, WORKER)}")
    host.until(f"systemctl is-failed {WORKER}")
    said = host.sh("gpuinfer doctor units.workers").output
    assert f"{WORKER}.service failed (signal): killed by SIGKILL\n" in said
    host.ok(f"rm {drop_in}; systemctl daemon-reload")
    start_worker(host)
    all_completed(host, [predict(host)])


def test_a_full_redis_refuses_and_recovers(host: Container) -> None:
    """maxmemory reached: 429 with Retry-After for new work; when there is room, all goes on."""
    cli = (
        "REDISCLI_AUTH=$(cat /etc/gpuinfer/credentials/admin)"
        " redis-cli -s /run/gpuinfer/redis/redis.sock --user admin --no-auth-warning"
    )
    host.ok(f"{cli} config set maxmemory 1mb")
    said = host.ok(f"curl -s -i -d '{TWO}' http://127.0.0.1:8080/predict")
    assert " 429 " in said.splitlines()[0]
    assert "retry-after:" in said.lower()
    assert "error   redis.reach" in host.sh("gpuinfer doctor redis").output
    host.ok(f"{cli} config set maxmemory 1gb")
    all_completed(host, [predict(host)])


def test_a_full_disk_under_always_is_told_and_waited_for(host: Container) -> None:
    """Redis ends; the front answers 503 with the reason; with room again all goes on by itself."""
    data = "/var/lib/gpuinfer/redis"
    since = host.ok("date '+%Y-%m-%d %H:%M:%S'").strip()
    host.ok(f"systemctl stop gpuinfer-redis && mount -t tmpfs -o size=100m none {data}")
    host.ok(
        "cp /etc/gpuinfer/gpuinfer.toml /root/; sed -i 's/^#appendfsync.*/appendfsync = \"always\"/' "
        "/etc/gpuinfer/gpuinfer.toml"
    )
    try:
        host.ok("systemctl start gpuinfer-redis")
        before = [predict(host)]
        told = journal(host, "-b", "_SYSTEMD_UNIT=gpuinfer-redis.service")
        assert any("nothing is promised about a power cut: tmpfs" in str(line["MESSAGE"]) for line in told)
        host.sh(f"dd if=/dev/zero of={data}/fill bs=64k 2>/dev/null")
        host.until(
            f"curl -s -d '{TWO}' http://127.0.0.1:8080/predict | grep 'the disk of {data} is full'",
        )
        head, _, body = host.ok(f"curl -s -i -d '{TWO}' http://127.0.0.1:8080/predict").partition("\n\n")
        assert " 503 " in head.splitlines()[0]
        code = json.loads(body)["error"]["code"]
        host.until("systemctl show -P StatusText gpuinfer-redis | grep 'is full'")
        host.ok(f"for i in $(seq 100); do curl -s -d '{TWO}' http://127.0.0.1:8080/predict; done")
        told = journal(host, f"--since='{since}'", "_SYSTEMD_UNIT=gpuinfer-api.service", "-p", "warning")
        # Others began in the same second, or before: an earlier test's refusals end by the way.
        told = [line for line in told if line.get("CODE") == code]
        assert any("is full" in str(line.get("REASON")) for line in told), told
        said_so = actions(told)
        assert said_so.count("requests_refused") - said_so.count("requests_refused_no_more") == 1, said_so
        assert len(said_so) < 10, said_so
        host.ok(f"rm {data}/fill")
        host.until(f"curl -s -d '{TWO}' http://127.0.0.1:8080/predict | grep task_id")
        all_completed(host, [*before, predict(host)])
        host.until("journalctl -b -u gpuinfer-redis -p warning --no-pager | grep 'there is room again'")
    finally:
        host.ok(f"rm -f {data}/fill; cp /root/gpuinfer.toml /etc/gpuinfer/; systemctl stop gpuinfer-redis")
        host.ok(f"umount {data}; systemctl start gpuinfer-redis")
