# SPDX-License-Identifier: Apache-2.0
"""Flower as its unit starts it, on our Redis with its users, and a real worker."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpuinfer import Client
from gpuinfer.errors import TaskRevoked
from tests.brokers import PASSWORDS, OurRedis
from tests.models_for_tests import add_scalar, python_model
from tests.services import free_port
from tests.workers import NAME, Workers, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.our_redis]

LOGIN = ("admin", "secret")
#: Each batch waits until the file is there.
GATED = """
import time
from pathlib import Path


class Model:
    def predict(self, batch: list[str]) -> list[str]:
        while not Path(GATE).exists():
            time.sleep(0.02)
        return batch
"""


class Flower:
    """``gpuinfer celery flower`` with the rights and the password of the unit."""

    def __init__(self, workers: Workers, folder: Path) -> None:
        port = free_port()
        folder.mkdir()
        (folder / "broker_password").write_text(PASSWORDS["admin"])
        (folder / "flower_password").write_text(LOGIN[1] + "\n")
        command = [sys.executable, "-m", "gpuinfer", "celery", "flower", f"--port={port}"]
        self.process = workers.spawn(
            *command, name="flower", broker_username="admin", credentials_directory=folder
        )
        self.process.wait_for_line("Visit me at http://127.0.0.1")
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=LOGIN, timeout=60)

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        return answer.json() if answer.status_code == 200 else None

    def post(self, path: str) -> Any:
        answer = self.http.post(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def workers(self) -> dict[str, dict[str, Any]]:
        return {one["hostname"]: one for one in self.get("/workers?json=1")["data"]}

    def task(self, task_id: str) -> dict[str, Any]:
        """Return what is known of a task; nothing where none is."""
        return self.get(f"/api/task/info/{task_id}") or {}

    def waiting(self) -> dict[str, int]:
        """Return how many tasks wait in each queue where some do."""
        queues = self.get("/api/queues/length")["active_queues"]
        return {one["name"]: one["messages"] for one in queues if one["messages"]}


def test_flower(redis_server: OurRedis, workers: Workers, client: Client) -> None:
    """A busy worker is online; queues by model; run times; what waits and what runs is revoked; a login."""
    gate = workers.folder / "gate"
    code = GATED.replace("GATE", repr(str(gate)))
    tables = "soft_time_limit_s = 400\nhard_time_limit_s = 500\nmax_batch_size = 1\n"
    python_model(workers.folder / "models" / "gated", code, tables)
    add_scalar(workers.folder / "models" / "add")
    worker = workers.start(
        broker_username="worker",
        credentials_directory=redis_server.credentials("worker"),
        worker_models="add,gated",
    )
    flower = Flower(workers, workers.folder / "flower")
    wait_until(lambda: flower.get("/api/workers?refresh=1"), 60)
    http = flower.http
    with closing(http):
        assert http.get("/workers", auth=("admin", "wrong")).status_code == 401
        assert httpx.get(f"{http.base_url}/tasks").status_code == 401
        wait_until(lambda: flower.workers().get(NAME, {}).get("status"), 60)

        def told_of_one() -> bool:  # it asks for tasks' events every 5 s
            task = client.submit({"x": [1, 2, 3, 4], "k": 0}, model="add")
            client.result(task, timeout_s=60)
            return flower.task(task).get("state") == "SUCCESS"

        wait_until(told_of_one, 60)

        def beats() -> int:
            return int(flower.workers()[NAME].get("worker-heartbeat", 0))

        running = client.submit("x", model="gated")
        wait_until(lambda: client.status(running).state == "running", 60)
        ids = [client.submit("x", model="gated", queue=queue) for queue in ("realtime", "batch", "batch")]
        sums = [client.submit({"x": [1, 2, 3, 4], "k": k}, model="add", priority=k) for k in (1, 9)]
        assert flower.waiting() == {"realtime.add": 2, "realtime.gated": 1, "batch.gated": 2}
        page = http.get("/broker").text
        assert all(name in page for name in ("realtime.add", "default.add", "batch.gated"))
        # It is in the middle of a batch, and goes on telling of itself.
        before = beats()
        wait_until(lambda: beats() >= before + 2 and flower.workers()[NAME]["status"], 60)
        assert flower.workers()[NAME]["active"] == 1
        wait_until(lambda: flower.task(running).get("state") == "STARTED", 60)

        flower.post(f"/api/task/revoke/{ids[0]}")
        with pytest.raises(TaskRevoked):
            client.result(ids[0], timeout_s=60)
        flower.post(f"/api/task/revoke/{running}")  # without terminate, what runs is left alone
        flower.post(f"/api/task/revoke/{ids[1]}")
        with pytest.raises(TaskRevoked):
            client.result(ids[1], timeout_s=60)
        assert client.status(running).state == "running"
        flower.post(f"/api/task/revoke/{running}?terminate=true")
        with pytest.raises(TaskRevoked):
            client.result(running, timeout_s=60)

        gate.touch()
        assert client.result(ids[2], timeout_s=60)
        assert [one["outputs"]["sum"][0] for one in client.results(sums, timeout_s=60)] == [2, 10]
        for task in (ids[2], *sums):
            wait_until(lambda t=task: flower.task(t).get("state") == "SUCCESS", 60)  # type: ignore[misc]
            told = flower.task(task)
            assert told["runtime"] > 0
            assert told["worker"] == NAME
        for task in (running, *ids[:2]):
            wait_until(lambda t=task: flower.task(t).get("state") == "REVOKED", 60)  # type: ignore[misc]
        assert flower.waiting() == {}
    # The first of the workers ends it, and says so.
    assert sum(
        ids[0] in json.loads(line).get("task_ids", ()) for line in worker.lines() if '"revoked"' in line
    )
    assert LOGIN[1] not in flower.process.text()
    assert "/etc/gpuinfer/credentials/flower" in flower.process.text()
