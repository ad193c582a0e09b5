# SPDX-License-Identifier: Apache-2.0
"""Chains through a real worker and a stock one, on our Redis with its users."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from celery import chain

from gpuinfer.errors import ChainRefused, ShapeMismatch
from gpuinfer.models.shipped import load_test_images
from tests import shop
from tests.brokers import OurRedis
from tests.workers import UNTRACED, Workers, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.our_redis]


def test_resize_predict_store(
    workers: Workers, redis_server: OurRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own task, ours, own task: each gets what the one before has returned, and failures are told."""
    images, labels = load_test_images()
    rows = images[0].tolist()[0]
    url = f"redis+socket://admin:admin-secret@{redis_server.socket}"
    monkeypatch.setenv("SHOP_URL", url)
    monkeypatch.setattr(shop.app.conf, "broker_url", url)
    monkeypatch.setattr(shop.app.conf, "result_backend", url)
    celery = str(Path(sys.executable).with_name("celery"))
    command = [*UNTRACED, celery, "-A", "tests.shop", "worker", "--pool=solo", "-l", "INFO", "-n", "shop@%h"]
    stock = workers.spawn(*command, name="shop")
    # It may write into "celery" alone, whatever its own settings say.
    ours = workers.start(
        broker_username="worker",
        credentials_directory=redis_server.credentials("worker"),
        queue_chain_queues="bank",
    )
    stock.wait_for_line(r"ready\.", timeout=90)
    predict = shop.app.signature("gpuinfer.predict", queue="realtime")
    with shop.app:
        done = chain(shop.resize.s(rows), predict, shop.store.s(7), app=shop.app).apply_async()
        assert done.get(timeout=60) == {"order": 7, "class": labels[0], "model": "digits"}

        wrong = predict.clone()
        wrong.link_error(shop.failed.s())
        broken = chain(shop.resize.s(rows[:3]), wrong, shop.store.s(8), app=shop.app).apply_async()
        with pytest.raises(ShapeMismatch):
            broken.get(timeout=60)
        with redis_server.client() as admin:
            wait_until(lambda: admin.llen(shop.FAILED), 60)
            assert admin.lrange(shop.FAILED, 0, -1) == [broken.parent.id.encode()]

        refused = predict.clone(args=([rows],)) | shop.store.s(9).set(queue="bank")
        refused = refused.apply_async()
        with pytest.raises(ChainRefused, match="bank"):
            refused.get(timeout=60)
        assert refused.parent.get(timeout=60)["class"] == labels[0]
    ours.wait_for_line('"chain_refused"', 60)
    assert stock.running
