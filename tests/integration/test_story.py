# SPDX-License-Identifier: Apache-2.0
"""The story of a task, told by the logs of the API and the workers: every line that names it, in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.api import schemas
from gpuinfer.errors import InputError
from gpuinfer.queue import keys
from tests.apis import Api, submit
from tests.models_for_tests import latched
from tests.services import RedisServer, whole_lines
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration

Line = dict[str, Any]


def story(task_id: str, *texts: str) -> list[Line]:
    """Return the lines that name a task, as ``journalctl TASK_ID=...`` would: alone, or among others."""
    lines = [json.loads(line) for text in texts for line in whole_lines(text) if line.startswith("{")]
    told = [line for line in lines if line.get("task_id") == task_id or task_id in line.get("task_ids", ())]
    return sorted(told, key=lambda line: line["timestamp"])


def actions(lines: list[Line]) -> list[str]:
    return [line["action"] for line in lines]


def test_from_request_to_result(
    workers: Workers, redis_server: RedisServer, client: Client, tmp_path: Path
) -> None:
    """Accepted by the API, in one line of a batch, fetched; a bad one's failure, a cancelled one's end.

    With log.requests = "all", and at a low rate.
    """
    with Api(redis_server, tmp_path, log_requests="all") as api:
        _from_request_to_result(workers, api, client)


def _from_request_to_result(workers: Workers, api: Api, client: Client) -> None:
    good = [submit(api, {"inputs": schemas.DIGIT, "queue": "default", "priority": 3}), submit(api)]
    bad, gone = submit(api, [1, 2, 3]), submit(api)
    api.http.post(f"/cancel/{gone}")
    worker = workers.start()
    client.results([*good, bad], timeout_s=60, return_errors=True)
    worker.wait_for_line('"batch_done"')  # its line comes after the results were told
    api.http.get(f"/result/{good[0]}")
    worker.terminate()
    logs = api.process.text(), worker.text()
    for task_id in good:
        accepted, done = story(task_id, *logs)[:2]
        assert actions([accepted, done]) == ["task_accepted", "batch_done"]
        assert {"batch_size", "duration_ms", "model", "queues", "failed"} <= set(done)
        assert (done["worker"], done["gpu"], done["device"]) == (NAME, 0, "cpu")
    assert actions(story(good[0], *logs)) == ["task_accepted", "batch_done", "request"]
    assert actions(story(bad, *logs)) == ["task_accepted", "task_failed", "batch_done"]
    failed = story(bad, *logs)[1]
    assert (failed["level"], failed["code"], failed["queue"]) == ("info", "shape_mismatch", "realtime")
    assert actions(story(gone, *logs)) == ["task_accepted", "task_cancelled", "task_skipped"]


def test_what_was_sent_is_not_told(workers: Workers, redis_server: RedisServer, client: Client) -> None:
    """Thousands of foreign names, half surrogates in them: one short line, and a result to read."""
    worker = workers.start()
    with Celery(
        "stranger", broker=redis_server.url.replace("unix", "redis+socket"), set_as_current=False
    ) as app:
        hostile = {"image": {f"PAYLOAD\ud800{number}": number for number in range(2000)}}
        task_id = app.send_task("gpuinfer.predict", [hostile], queue="realtime", ignore_result=False).id
    worker.wait_for_line('"task_failed"')
    with pytest.raises(InputError, match="has the keys b64, dtype and shape"):
        client.result(task_id, timeout_s=60)
    worker.terminate()
    text = worker.text()
    assert actions(story(task_id, text)) == ["task_failed", "batch_done"]
    assert "PAYLOAD" not in text
    assert max(map(len, text.splitlines())) < 3000


#: What the journal has of any task.
OLD = {
    "__REALTIME_TIMESTAMP": "1000000",
    "SYSLOG_IDENTIFIER": "gpuinfer-worker",
    "_PID": "7",
    "MESSAGE": "an old line",
}


def logs_task(workers: Workers, task_id: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``gpuinfer logs --task`` where the journal has one line about it, of long ago."""
    folder = workers.folder / "bin"
    folder.mkdir(exist_ok=True)
    script = f"#!/bin/sh\ncat <<'END'\n{json.dumps(OLD)}\nEND\n"
    (folder / "journalctl").write_text(script, encoding="utf-8")
    (folder / "journalctl").chmod(0o755)
    return subprocess.run(
        [sys.executable, "-m", "gpuinfer", "logs", "--task", task_id, *options],
        env=workers.environment() | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_story_at_any_rate(workers: Workers, client: Client) -> None:
    """Where no line names a task that went well, its result record tells when it was sent, began and ended.

    One that failed is named all the same, with the reason; one that waits is told to wait.
    """
    good, bad = client.submit(schemas.DIGIT), client.submit([1.0, 2.0, 3.0])
    waiting = logs_task(workers, good)
    words = [line.rpartition("result record: ")[2] for line in waiting.stdout.splitlines()[1:]]
    assert words[:2] == ["submitted", "waits in the queue"]
    worker = workers.start(log_named_tasks=0)
    client.results([good, bad], timeout_s=60, return_errors=True)
    worker.terminate()
    assert story(good, worker.text()) == []
    assert actions(story(bad, worker.text())) == ["task_failed"]
    assert '"batches_done"' in worker.text()
    told = [json.loads(line) for line in logs_task(workers, good, "--json").stdout.splitlines()]
    assert [entry.get("ACTION") for entry in told] == [None, "submitted", "began", "completed"]
    times = [int(entry["__REALTIME_TIMESTAMP"]) for entry in told]
    assert times == sorted(times)
    assert {entry["TASK_ID"] for entry in told[1:]} == {good}
    lines = logs_task(workers, bad).stdout.splitlines()
    assert lines[0].endswith("gpuinfer-worker[7]: an old line")
    assert lines[1].endswith("result record: submitted")
    assert f"result record: failed on {NAME}, " in lines[-1]
    assert "shape_mismatch" in lines[-1]
    unknown = logs_task(workers, "never-sent")
    assert unknown.stdout.count("\n") == 1
    assert "there is no result record" in unknown.stderr


def test_deaths(workers: Workers, client: Client) -> None:
    """A batch that runs for long says so; after a SIGKILL its tasks are named as put back, then as dead."""
    latched(workers.folder / "models" / "slow", max_batch_size=2)
    ids = client.submit_many([[1.0]] * 2, model="slow")
    texts = []
    while not all(client.status(task_id).final for task_id in ids):
        worker = workers.start(worker_models="slow", queue_max_deaths=2)
        if not all(client.status(task_id).final for task_id in ids):
            worker.wait_for_line('"batch_running"')
        worker.kill()
        texts.append(worker.text())
    for task_id in ids:
        told = story(task_id, *texts)
        assert actions(told)[:2] == ["batch_running", "restored"]
        assert actions(told)[-1] == "task_dead_lettered"
        assert (told[1]["level"], set(told[1]["task_ids"])) == ("warning", set(ids))
        assert (told[-1]["level"], told[-1]["deaths"], told[-1]["queue"]) == ("error", 2, "realtime")


def test_restore_by_hand(workers: Workers, client: Client) -> None:
    """``gpuinfer restore`` names what it puts back on standard error, and sums up on standard output."""
    latched(workers.folder / "models" / "slow")
    task_id = client.submit([1.0], model="slow")
    worker = workers.start(worker_models="slow")
    worker.wait_for_line('"batch_running"')
    worker.kill()
    done = subprocess.run(
        [sys.executable, "-m", "gpuinfer", "restore", "0"],
        env=workers.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    summed_up, named = done.stdout.splitlines()
    assert summed_up == f"{NAME}: 1 task put back, 0 dead letters"
    assert named.split() == ["put", "back", task_id]
    (restored,) = story(task_id, done.stderr)
    assert (restored["action"], restored["worker"], restored["gpu"]) == ("restored", NAME, 0)


def test_what_a_stop_leaves(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A worker that stops names the tasks of its last batch; what waits stays where it is."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=1)
    app = Celery("stranger", broker=f"redis+socket://{redis_server.socket}", set_as_current=False)
    later = app.send_task("gpuinfer.predict", [[1.0], "slow"], queue="realtime", countdown=600)
    worker = workers.start(worker_models="slow")
    wait_until(lambda: redis_server.client().zcard(keys.later("realtime")), timeout=60)
    first, second = client.submit_many([[1.0]] * 2, model="slow")
    wait_until(lambda: client.status(first).state == "running", timeout=60)
    worker.send(signal.SIGTERM)
    worker.wait_for_line('"stopping"')
    latch.open()
    assert worker.wait() == 0
    assert actions(story(first, worker.text())) == ["batch_running", "batch_done"]
    assert actions(story(second, worker.text())) == [], "nothing is held behind a long batch"
    assert actions(story(later.id, worker.text())) == []
    assert redis_server.client().zcard(keys.later("realtime")) == 1
