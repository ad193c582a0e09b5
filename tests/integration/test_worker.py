# SPDX-License-Identifier: Apache-2.0
"""A real worker on a real Redis: what it answers, in which order, and how it starts and ends."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from gpuinfer import Client
from gpuinfer.errors import (
    InputError,
    PayloadTooLarge,
    ShapeMismatch,
    TaskExpired,
    TaskNotFound,
    TaskRevoked,
    UnknownModel,
)
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys
from gpuinfer.queue.message import decode
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import QueueSettings
from tests.models_for_tests import add_scalar, latched, perceptron
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


def plain_celery(redis: RedisServer) -> Celery:
    """Return an application as a stranger writes it: the two URLs, nothing of ours."""
    url = f"redis+socket://{redis.socket}"
    return Celery("stranger", broker=url, backend=url, set_as_current=False)


def listen(app: Celery, kind: str, handler: Any, enough: Any, timeout: float = 60.0) -> None:
    """Hand events to ``handler`` until it is enough, as Flower's receiver does."""
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, {kind: handler})
        until = time.monotonic() + timeout
        with receiver.consumer_context() as (own, _, _):
            while not enough():
                assert time.monotonic() < until, "the events did not come in time"
                with contextlib.suppress(TimeoutError):
                    own.drain_events(timeout=0.5)


def test_every_digit_as_directly(workers: Workers, client: Client) -> None:
    """Through the queue each test image gets the class that the model gives when called directly."""
    from gpuinfer.models.loader import load
    from gpuinfer.models.repository import Repository

    images, labels = load_test_images()
    model = load(Repository([]).get("digits"), "cpu")
    direct = [int(model.forward([(image,)])[0][0].argmax()) for image in images]
    workers.start()
    answers = client.results(client.submit_many([image.tolist() for image in images]), timeout_s=60)
    assert [answer["class"] for answer in answers] == direct
    assert sum(int(a == b) for a, b in zip(direct, labels, strict=True)) / len(labels) >= 0.98
    assert {answer["device"] for answer in answers} == {"cpu"}
    # What it tells of a task beside its result.
    status = client.wait(client.submit(images[0].tolist(), metadata={"user": "7"}), 60)
    about = dict(status.about)
    assert about.pop("run_ms") > 0
    assert about.pop("version") == model.version
    assert about == {"queue": "realtime", "model": "digits", "batch_size": 1, "metadata": {"user": "7"}}


def test_arrays_and_large_bodies(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Arrays, alone and as a batch, small and large; a body that is gone, and one that its end took along."""
    images, labels = load_test_images()
    raw = redis_server.client()
    small = client.submit_many(images[:5].transpose(0, 1, 3, 2)[..., ::-1].swapaxes(2, 3)[..., ::-1, :])
    large = client.submit_batch(images.astype(">f8"), top_k=1)
    listed = client.submit_batch([image.tolist() for image in images] * 4)
    cancelled, robbed = client.submit_batch(images), client.submit_batch(tuple(images))
    assert raw.exists(*map(keys.body, (large, listed, cancelled, robbed))) == 4
    assert client.cancel(cancelled)
    assert raw.delete(keys.body(robbed)) == 1
    workers.start()
    assert [answer["class"] for answer in client.results(small, timeout_s=60)] == list(labels[:5])
    for task_id, times in ((large, 1), (listed, 4)):
        found = [answer["class"] for answer in client.result(task_id, timeout_s=60)]
        assert sum(int(a == b) for a, b in zip(found, list(labels) * times, strict=True)) / len(found) >= 0.98
    with pytest.raises(InputError, match="somebody has deleted it"):
        client.result(robbed, timeout_s=60)
    with pytest.raises(TaskRevoked):
        client.result(cancelled, timeout_s=60)
    wait_until(lambda: not list(raw.scan_iter("gpuinfer:inflight:*")))
    assert not raw.exists(keys.BODIES, *map(keys.body, (large, listed, cancelled)))
    assert raw.hlen(keys.DEAD) == 0


def test_plain_celery_producer(workers: Workers, redis_server: RedisServer) -> None:
    """A producer that knows the URL and the task's name submits, waits, and reads errors as exceptions."""
    images, labels = load_test_images()
    workers.start()
    with plain_celery(redis_server) as stranger:
        task = stranger.send_task("gpuinfer.predict", [images[0].tolist()], queue="realtime", priority=3)
        answer = task.get(timeout=60)
        assert answer["class"] == labels[0]
        job = stranger.send_task("gpuinfer.batch_predict", [[images[1].tolist(), [0]]], queue="batch")
        first, second = job.get(timeout=60)
        assert first["class"] == labels[1]
        assert second["error"]["code"] == "shape_mismatch"
        bad = stranger.send_task("gpuinfer.predict", [[1, 2]], {"model": "digits"}, queue="realtime")
        with pytest.raises(ShapeMismatch):
            bad.get(timeout=60)
        most = QueueSettings().max_items
        with pytest.raises(PayloadTooLarge, match=f"max_items is {most}"):
            stranger.send_task("gpuinfer.batch_predict", [[0] * (most + 1)], queue="batch").get(timeout=60)


def test_several_inputs(workers: Workers, client: Client) -> None:
    """A model of a tensor and a scalar is given both by name; a missing one is named."""
    add_scalar(workers.folder / "models" / "add")
    workers.start(worker_models="add")
    ids = [client.submit({"x": [1, 2, 3, 4], "k": k}, model="add") for k in (10, 20)]
    sums = [answer["outputs"]["sum"] for answer in client.results(ids, timeout_s=60)]
    assert sums == [[11, 12, 13, 14], [21, 22, 23, 24]]
    with pytest.raises(InputError, match=r"inputs\.k"):
        client.result(client.submit({"x": [1, 2, 3, 4]}, model="add"), timeout_s=60)


def test_bad_neighbours_fail_alone(workers: Workers, client: Client) -> None:
    """In one batch each bad input gets its own error, and each good one its result."""
    perceptron(workers.folder / "models" / "mlp")
    inputs: list[Any] = [[0.5] * 64 for _ in range(40)]
    inputs[3], inputs[7], inputs[11] = [0.5] * 63, ["x"] * 64, {"b64": "!", "dtype": "float32", "shape": [64]}
    ids = client.submit_many(inputs, model="mlp")
    workers.start(worker_models="mlp")
    answers = client.results(ids, timeout_s=60, return_errors=True)
    failed = {i for i, answer in enumerate(answers) if isinstance(answer, Exception)}
    assert failed == {3, 7, 11}
    assert isinstance(answers[3], ShapeMismatch)


def test_a_model_that_nobody_knows(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Our client is told at once; a plain producer's task ends with that, and goes round no more."""
    workers.start()
    wait_until(lambda: redis_server.client().exists(keys.CATALOGUE))
    with pytest.raises(UnknownModel, match="digits"):
        client.submit([0.0] * 64, model="nobody")
    with plain_celery(redis_server) as stranger:
        task = stranger.send_task("gpuinfer.predict", [[0.0] * 64], {"model": "nobody"}, queue="realtime")
        with pytest.raises(UnknownModel):
            task.get(timeout=60)
    assert not redis_server.client().exists("realtime.nobody")


def test_compressed(workers: Workers, redis_server: RedisServer) -> None:
    """A plain producer may compress its messages; what unpacks to too much is refused."""
    app = plain_celery(redis_server)
    images, labels = load_test_images()
    workers.start(queue_max_payload_bytes=100_000)
    task = app.send_task("gpuinfer.predict", [images[0].tolist()], queue="realtime", compression="gzip")
    assert task.get(timeout=60)["class"] == labels[0]
    task = app.send_task("gpuinfer.predict", ["x" * 1_000_000], queue="realtime", compression="gzip")
    with pytest.raises(PayloadTooLarge):
        task.get(timeout=60)


def test_awake_while_busy(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """In the middle of a long batch the worker answers inspect and honours revoke for what waits."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=1)
    workers.start(worker_models="slow")
    running = client.submit([1.0], model="slow")
    wait_until(lambda: client.status(running).state == "running")
    waiting = client.submit([1.0], model="slow")
    with plain_celery(redis_server) as stranger:
        inspect = stranger.control.inspect([NAME], timeout=60.0)  # until this one has answered
        assert inspect.ping() == {NAME: {"ok": "pong"}}
        active = inspect.active()[NAME]
        assert [task["id"] for task in active] == [running]
        assert inspect.stats()[NAME]["total"] == {"gpuinfer.predict": 1}
        assert inspect.reserved()[NAME] == [], "what waits behind a long batch waits in Redis, for anybody"
        assert stranger.control.revoke(waiting, destination=[NAME], reply=True, timeout=60.0)
    assert client.status(running).state == "running"
    latch.open()
    assert client.result(running, timeout_s=60)["outputs"]["twice"] == [2.0]
    with pytest.raises(TaskRevoked):
        client.result(waiting, timeout_s=60)


def test_heartbeats_while_busy(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A busy worker goes on sending the heartbeat event that Flower reads."""
    latched(workers.folder / "models" / "slow", max_batch_size=1)
    workers.start(worker_models="slow")
    running = client.submit([1.0], model="slow")
    wait_until(lambda: client.status(running).state == "running")
    beats: list[float] = []
    with plain_celery(redis_server) as stranger:
        listen(
            stranger, "worker-heartbeat", lambda e: beats.append(e.get("active", 0)), lambda: len(beats) >= 2
        )
    assert client.status(running).state == "running"
    assert beats[-1] == 1


def test_events_for_flower(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """With events on, each task's way is told: received, started, succeeded or failed."""
    images, _ = load_test_images()
    workers.start()
    seen: dict[str, list[str]] = {}
    ids: list[str] = []
    with plain_celery(redis_server) as stranger:
        assert stranger.control.enable_events(destination=[NAME], reply=True, timeout=60)

        def note(event: dict[str, Any]) -> None:
            if not ids:
                wrong = images[0].tolist()
                wrong[0][7][7] = "x"  # of a list, a client looks at its shape and its first number
                ids.extend([client.submit(images[0].tolist()), client.submit(wrong)])
            seen.setdefault(event.get("uuid", ""), []).append(event["type"])

        listen(stranger, "*", note, lambda: all(len(seen.get(i, [])) >= 3 for i in ids or ["?"]))
    good, bad = ids
    assert seen[good] == ["task-received", "task-started", "task-succeeded"]
    assert seen[bad] == ["task-received", "task-started", "task-failed"]


def test_expired_and_cancelled_cost_nothing(workers: Workers, client: Client) -> None:
    """What is past its deadline, or cancelled, ends as that and is not run."""
    late = client.submit([0.0] * 64, expires_s=0.05)
    gone = client.submit([0.0] * 64)
    assert client.cancel(gone)
    time.sleep(0.1)
    worker = workers.start()
    with pytest.raises(TaskExpired):
        client.result(late, timeout_s=60)
    assert client.status(late).state == "expired"
    with pytest.raises(TaskRevoked):
        client.result(gone, timeout_s=60)
    worker.terminate()
    assert '"batch_done"' not in worker.text()


def test_fire_and_forget(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """A task that keeps no result runs, and leaves no result behind."""
    images, _ = load_test_images()
    task = client.submit(images[0].tolist(), ignore_result=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.result, task, timeout_s=60)
        workers.start()
        assert waiting.result()["class"] == 2
    assert not redis_server.client().exists(keys.inflight(NAME))
    with pytest.raises(TaskNotFound):
        client.status(task)


def test_sigterm_finishes_and_hands_back(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """SIGTERM: the running batch is finished and settled, the rest is back in its list, exit 0."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=2)
    ids = client.submit_many([[1.0]] * 10, model="slow")
    worker = workers.start(worker_models="slow")
    wait_until(lambda: client.status(ids[0]).state == "running")
    worker.send(signal.SIGTERM)
    worker.wait_for_line('"stopping"')
    latch.open()
    assert worker.wait() == 0
    states = [client.status(task).state for task in ids]
    assert states == ["completed"] * 2 + ["queued"] * 8
    assert redis_server.client().llen("realtime.slow") == 8
    assert not redis_server.client().exists(keys.inflight(NAME))
    workers.start(worker_models="slow")
    again = list(client.as_completed(ids, timeout_s=60))
    assert len(again) == 10
    assert not any(status.redelivered for status in again)


def test_one_process_for_a_number(workers: Workers) -> None:
    """A second worker of the same number is refused, and says which process has it."""
    first = workers.start()
    log = workers.folder / "second.log"
    second = workers.spawn(sys.executable, "-m", "gpuinfer", "worker", "0", name="second")
    assert second.wait() == 73
    assert f"process {first.pid}" in log.read_text()


def test_celery_command(workers: Workers, client: Client) -> None:
    """``celery -A gpuinfer worker`` serves as well; prefork is refused with the reason."""
    images, labels = load_test_images()
    celery = [str(Path(sys.executable).with_name("celery")), "-A", "gpuinfer", "worker"]
    forked = workers.spawn(*celery, "--pool=prefork", "-n", "gpu1@%h", name="forked")
    assert forked.wait() == 78
    assert "forked process" in forked.text()
    solo = workers.spawn(*celery, "--pool=solo", "-n", "gpu0@%h", name="solo")
    solo.wait_for_line('"worker_ready"')
    assert client.result(client.submit(images[0].tolist()), timeout_s=60)["class"] == labels[0]
    assert solo.terminate() == 0


def test_worker_that_cannot_start(workers: Workers) -> None:
    """No GPU where one is demanded: exit 69; a model that is not there: its name; both say why."""
    no_gpu = workers.start(ready=False, worker_device="cuda")
    assert no_gpu.wait() == 69
    assert "no usable GPU" in no_gpu.text()
    no_model = workers.start(ready=False, worker_models="nobody")
    assert no_model.wait() == 65
    assert "nobody" in no_model.text()


def test_unknown_task_and_garbage(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Garbage goes to the dead letters and stops nobody; an unknown task fails as Celery fails it."""
    images, _ = load_test_images()
    raw = redis_server.client()
    good = decode(Submission(task="gpuinfer.predict", inputs=[1], queue="realtime").encode()).raw

    def named(task_id: object, **changes: object) -> bytes:
        return json.dumps(good | {"headers": good["headers"] | {"id": task_id}} | changes).encode()

    worker = workers.start()
    garbage = [
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"headers": {}, "properties": {}}',
        b"[" * 200_000,
        named("deep", body="[" * 3000),
        named("short", body="[1]"),
        named("counts", gpuinfer="xx"),
        named("pickle", **{"content-type": "application/x-python-serialize"}),
        named("\ud800"),
        named(7),
    ]
    for entry in garbage:
        raw.lpush("realtime", entry)
    refused = {
        "limits": good["headers"] | {"id": "limits", "timelimit": 5},
        "expires": good["headers"] | {"id": "expires", "expires": "never"},
        "eta": good["headers"] | {"id": "eta", "eta": []},
    }
    for headers in refused.values():
        raw.lpush("realtime", json.dumps(good | {"headers": headers}))
    raw.lpush("realtime", json.dumps(good | {"body": json.dumps([[1], {"\ud800": 1}, {}])}))
    client.result(client.submit(images[0].tolist()), timeout_s=60)
    for task_id in (*refused, good["headers"]["id"]):
        with pytest.raises(InputError):
            client.result(task_id, timeout_s=60)
    wait_until(lambda: raw.hlen(keys.DEAD) == len(garbage))
    with plain_celery(redis_server) as stranger:
        strange = stranger.send_task("no.such.task", [], queue="default")
        with pytest.raises(Exception, match="no such task"):
            strange.get(timeout=60)
    assert worker.running
    wait_until(lambda: not raw.hkeys(keys.inflight(NAME)))


def test_eta_and_canvas(workers: Workers, redis_server: RedisServer) -> None:
    """A countdown is waited for; what no worker of ours could go on with is refused, not dropped."""
    images, labels = load_test_images()
    workers.start()
    with plain_celery(redis_server) as stranger:
        begun = time.monotonic()
        task = stranger.send_task("gpuinfer.predict", [images[0].tolist()], queue="realtime", countdown=2)
        assert task.get(timeout=60)["class"] == labels[0]
        assert time.monotonic() - begun >= 1.9
        counted = stranger.send_task(
            "gpuinfer.predict", [[1]], queue="realtime", chord=stranger.signature("some.task", task_id="body")
        )
        for task_id in (counted.id, "body"):
            with pytest.raises(InputError, match="part of a chord"):
                stranger.AsyncResult(task_id).get(timeout=60)


def test_stop_signal_twice(workers: Workers, client: Client) -> None:
    """A second SIGTERM during the drain changes nothing: the batch is still finished."""
    latch = latched(workers.folder / "models" / "slow", max_batch_size=1)
    task = client.submit([1.0], model="slow")
    worker = workers.start(worker_models="slow")
    wait_until(lambda: client.status(task).state == "running")
    worker.send(signal.SIGTERM)
    worker.wait_for_line('"stopping"')
    worker.send(signal.SIGTERM)
    latch.open()
    assert worker.wait() == 0
    assert client.status(task).state == "completed"
