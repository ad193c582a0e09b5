# SPDX-License-Identifier: Apache-2.0
"""An application of its own on our Redis: stock Celery, whose chains lead through predictions."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

URL = os.environ.get("SHOP_URL", "memory://")
#: Where its errback notes what has failed.
FAILED = "shop:failed"

app = Celery("shop", broker=URL, backend=URL, set_as_current=False)
app.conf.broker_connection_retry_on_startup = True


@app.task(name="shop.resize")  # type: ignore[untyped-decorator]  # celery is not annotated
def resize(rows: list[list[float]]) -> list[list[list[float]]]:
    """Return an image as the model takes it."""
    return [rows]


@app.task(name="shop.store")  # type: ignore[untyped-decorator]  # celery is not annotated
def store(result: dict[str, Any], order: int) -> dict[str, Any]:
    """Return what would be kept of a prediction."""
    return {"order": order, "class": result["class"], "model": result["model"]}


@app.task(name="shop.failed")  # type: ignore[untyped-decorator]  # celery is not annotated
def failed(task_id: str) -> None:
    """Note the id of what has failed."""
    app.backend.client.lpush(FAILED, task_id)
