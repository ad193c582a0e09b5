# SPDX-License-Identifier: Apache-2.0
"""The order of starting and stopping: the boot waits for no model, and what was accepted outlives a stop."""

from __future__ import annotations

import json

import pytest

from tests.host.admin import TWO, ask, ended, predict, properties, redis_cli, result
from tests.host.container import Container

pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

WORKER = "gpuinfer-worker@0.service"
LOADING = "/etc/systemd/system/gpuinfer-worker@0.service.d/loading.conf"
#: To systemd a worker that loads is one that has not said READY yet: it does so when we say.
LOADS = "[Service]\nExecStartPre=+/bin/sh -c 'until test -e /run/loaded; do sleep 0.1; done'\n"
UP = "systemctl -q is-active multi-user.target"


def test_the_boot_does_not_wait_for_models(host: Container) -> None:
    """multi-user.target is reached and the API accepts while a worker still loads; then it is done."""
    host.put(LOADING, LOADS)
    host.ok("systemctl daemon-reload; systemctl enable gpuinfer-worker@0")
    host.poweroff()
    host.boot(UP)
    assert properties(host, WORKER, "ActiveState")["ActiveState"] == "activating"
    task_id = predict(host)
    assert properties(host, WORKER, "ActiveState")["ActiveState"] == "activating"
    host.ok(f"touch /run/loaded; rm {LOADING}; systemctl daemon-reload")
    assert result(host, task_id)["status"] == "completed"
    host.until("systemctl is-system-running")


def test_what_was_accepted_outlives_a_stop(host: Container) -> None:
    """Requests come in all through `systemctl stop gpuinfer.target`: each that was accepted is done later."""
    body = json.dumps({"inputs": json.loads(TWO)})
    host.put("/tmp/body", body)
    host.put(
        "/tmp/ask",
        "until test -e /tmp/enough; do curl -s -d @/tmp/body http://127.0.0.1:8080/predict; echo; done",
    )
    host.ok("rm -f /tmp/enough; systemd-run -q --unit=ask -p StandardOutput=file:/tmp/answers bash /tmp/ask")
    host.until("[ $(grep -c task_id /tmp/answers) -ge 50 ]", what="50 requests")
    host.ok("systemctl stop gpuinfer.target")
    units = ("gpuinfer-redis", "gpuinfer-api", "gpuinfer-watcher", "gpuinfer-worker@0")
    host.until(" && ".join(f"[ $(systemctl show -P ActiveState {unit}) = inactive ]" for unit in units))
    host.ok("touch /tmp/enough")
    host.until("[ $(systemctl show -P ActiveState ask) = inactive ]")
    assert ended(host)[-1] == "gpuinfer-redis.service"
    host.ok("systemctl start gpuinfer.target")
    host.until("curl -sf http://127.0.0.1:8080/health/live", what="the API")
    accepted = [json.loads(line)["task_id"] for line in host.ok("grep task_id /tmp/answers").splitlines()]
    assert len(accepted) >= 50
    for task_id in accepted:
        assert result(host, task_id)["status"] == "completed"


def test_a_stop_of_all_ends_all(host: Container) -> None:
    """Though the watcher has every reason to start workers: it is told to stop at the same time, and does.

    A start that was on its way to systemd at that moment it undoes.
    """
    host.ok("systemctl stop gpuinfer-watcher; systemctl disable --now gpuinfer-worker@0")
    redis_cli(host, "del", "gpuinfer:watcher:memory:gpuhost")  # or it is known to be disabled by hand
    for _ in range(40):
        ask(host, f"-d '{TWO}' http://127.0.0.1:8080/predict")
    for round_ in range(5):
        host.ok("systemctl start gpuinfer.target; systemctl start --no-block gpuinfer-watcher")
        host.ok(f"sleep 0.{round_}; systemctl stop gpuinfer.target")
        host.until("[ -z \"$(systemctl list-jobs --no-legend 'gpuinfer*')\" ]", what="the end of all jobs")
        left = "systemctl list-units --plain --no-legend --state=active,activating 'gpuinfer-*.service'"
        assert [line for line in host.ok(left).splitlines() if "devices" not in line] == []
    host.ok("systemctl start gpuinfer.target gpuinfer-watcher")
    host.until(f"systemctl -q is-active {WORKER}", what="a worker: nobody has stopped any by hand")
