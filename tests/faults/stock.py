# SPDX-License-Identifier: Apache-2.0
"""Stock Celery in the usual set-up, for the kill test: late acknowledgement, prefetch 1, solo."""

from __future__ import annotations

import os

from celery import Celery

URL = f"redis+socket://{os.environ.get('STOCK_SOCKET', '')}"

app = Celery("stock", broker=URL, backend=URL, set_as_current=False)
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    task_track_started=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="stock.double")  # type: ignore[untyped-decorator]  # celery is not annotated
def double(value: float) -> float:
    """Return twice the value."""
    return 2 * value
