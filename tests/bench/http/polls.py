# SPDX-License-Identifier: Apache-2.0
"""Callers that wait: how much memory the front has with thousands of them, and after millions of requests.

    python -m tests.bench.http.polls [--polls 5000] [--seconds 30]

``--polls`` connections each ask ``GET /result/{id}?wait=60`` for a task that nobody runs yet; then all tasks
end, and each caller must hear of its own. After that, wrk submits and waits over 64 connections for
``--seconds``. Prints a line of JSON: the front's resident MiB before, with all waiting, after, and in the
course of the load.
"""

from __future__ import annotations

import asyncio
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import orjson

from tests.apis import Api, HandWorker
from tests.bench.http.client import Answer, Connections
from tests.bench.http.load import load
from tests.bench.machine import resident_mib
from tests.bench.models import vectors, write_models
from tests.services import RedisServer, ServiceError
from tests.workers import Workers

_RESULT: dict[str, Any] = {"predictions": []}


async def _poll(port: int, worker: HandWorker, count: int, pid: int) -> dict[str, Any]:
    connections = Connections("127.0.0.1", port)
    sent = [await connections.ask("POST", "/predict", b"[1,2]") for _ in range(count)]
    ids = [orjson.loads(one.body)["task_id"] for one in sent]
    before = resident_mib(pid)
    polls: list[asyncio.Task[Answer]] = []
    for task_id in ids:
        polls.append(asyncio.create_task(connections.ask("GET", f"/result/{task_id}?wait=60")))
        if len(polls) % 100 == 0:
            await asyncio.sleep(0.02)
    await asyncio.sleep(1)
    waiting = resident_mib(pid)
    began = time.perf_counter()
    while await asyncio.to_thread(worker.finish_all, _RESULT, 500):
        continue
    answers = await asyncio.gather(*polls)
    took_s = time.perf_counter() - began
    right = sum(
        answer.status == 200
        and (body := orjson.loads(answer.body))["status"] == "completed"
        and body["task_id"] == task_id
        for task_id, answer in zip(ids, answers, strict=True)
    )
    if right != count:
        raise ServiceError(f"{right} of {count} callers heard of the end of their tasks")
    connections.close()
    await asyncio.sleep(0.5)
    return {
        "polls": count,
        "before_mib": round(before, 1),
        "waiting_mib": round(waiting, 1),
        "after_mib": round(resident_mib(pid), 1),
        "all_told_s": round(took_s, 2),
    }


def _under_load(folder: Path, seconds: int) -> dict[str, Any]:
    """Return how much the front has in the course of a load, by quarters."""
    redis = RedisServer()
    workers = Workers(redis, folder)
    try:
        workers.start(worker_models="perceptron", traced=False)
        logs = folder / "load"
        logs.mkdir()
        with Api(redis, logs) as api:
            url, body = f"{api.address}/predict?wait=30", orjson.dumps(vectors(1)[0])
            load(url, body, 64, 3, folder)
            found, ended = [resident_mib(api.process.pid)], threading.Event()

            def look() -> None:
                while not ended.wait(seconds / 4):
                    found.append(resident_mib(api.process.pid))

            looking = threading.Thread(target=look)
            looking.start()
            done = load(url, body, 64, seconds, folder)
            ended.set()
            looking.join()
            found.append(resident_mib(api.process.pid))
    finally:
        workers.close()
        redis.close()
    return {"requests": done.requests, "mib": [round(one, 1) for one in found]}


@click.command()
@click.option("--polls", default=5000, show_default=True)
@click.option("--seconds", default=30, show_default=True, help="Of the load.")
def main(polls: int, seconds: int) -> None:
    """Measure, and print one line of JSON."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="gi-http-") as name:
        folder = Path(name)
        write_models(folder / "models")
        redis = RedisServer()
        try:
            with Api(redis, folder) as api, redis.client() as raw:
                worker = HandWorker(raw)
                worker.beat()
                port = int(api.address.rpartition(":")[2])
                found = asyncio.run(_poll(port, worker, polls, api.process.pid))
        finally:
            redis.close()
        found["load"] = _under_load(folder, seconds)
    click.echo(orjson.dumps(found).decode())


if __name__ == "__main__":
    main()
