# SPDX-License-Identifier: Apache-2.0
"""What plain Celery producers send, by a real worker: the first protocol, other names, Celery's own tasks."""

from __future__ import annotations

import uuid
from decimal import Decimal

import pytest
from celery import Celery
from kombu import Connection, Queue

from gpuinfer.errors import TaskNotServed, UsageError
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import keys, transport
from tests.integration.test_worker import plain_celery
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration


def test_what_celery_sends(workers: Workers, redis_server: RedisServer) -> None:
    """Protocol 1, kombu's types, an id with a slash and an alias run; Celery's own tasks end as errors."""
    images, labels = load_test_images()
    pixels = images[0].tolist()
    typed = [[[Decimal(str(pixel)) for pixel in row] for row in rows] for rows in pixels]
    worker = workers.start()
    with plain_celery(redis_server) as stranger:
        sent = [
            stranger.send_task("celery_app.predict", [pixels], queue="default"),
            stranger.send_task("gpuinfer.predict", [typed], queue="realtime", task_id=f"a/b {uuid.uuid4()}"),
            stranger.send_task("gpuinfer.predict", [pixels], queue="realtime", compression="gzip"),
        ]
        stranger.conf.task_protocol = 1
        with Celery("older", broker=stranger.conf.broker_url, set_as_current=False) as older:
            older.conf.task_protocol = 1
            first = older.send_task("gpuinfer.predict", [pixels], queue="realtime")
            sent.append(stranger.AsyncResult(first.id))
        assert [task.get(timeout=60)["class"] for task in sent] == [labels[0]] * 4

        predict = stranger.signature("gpuinfer.predict")
        built_in = [
            stranger.signature("celery.map", kwargs={"task": dict(predict), "it": [[1]]}),
            stranger.signature("celery.starmap", kwargs={"task": dict(predict), "it": [[1]]}),
            stranger.signature("celery.chunks", kwargs={"task": dict(predict), "it": [[1]], "n": 1}),
            stranger.signature("celery.accumulate", args=[1]),
            stranger.signature("celery.backend_cleanup"),
        ]
        for task in built_in:
            with pytest.raises(TaskNotServed, match=task.task):
                task.apply_async(queue="realtime").get(timeout=60)
    raw = redis_server.client()
    wait_until(lambda: not raw.exists(keys.inflight(NAME)), 60)
    assert raw.hlen(keys.DEAD) == 0
    assert worker.running


def test_nobody_fetches_a_task_by_himself(redis_server: RedisServer) -> None:
    """``basic.get`` on one of our queues is refused, and what waits there stays."""
    transport.register()
    with Connection(f"gpuinfer+socket://{redis_server.socket}") as connection:
        channel = connection.default_channel
        with connection.Producer() as producer:
            for name in ("realtime.resnet", "celery"):
                producer.publish({"x": 1}, routing_key=name, declare=[Queue(name, routing_key=name)])
        with pytest.raises(UsageError, match=r"realtime\.resnet: .*basic\.get"):
            channel.basic_get("realtime.resnet")
        assert redis_server.client().llen("realtime.resnet") == 1
        assert channel.basic_get("celery").payload == {"x": 1}
