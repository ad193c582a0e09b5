# SPDX-License-Identifier: Apache-2.0
"""The Celery application of a worker process, with gpuinfer's consumer and startup."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from celery import Celery, signals

from gpuinfer.queue.app import create_app
from gpuinfer.settings import Settings, load_settings
from gpuinfer.worker.bootstrap import on_worker_init


def create_worker_app(
    settings: Settings | None = None, read: Callable[[], Settings] = load_settings
) -> Celery:
    """Return an application whose workers serve the queue; without settings, they are read on first use."""
    read = cache(read)
    application = create_app(settings, read)
    application.add_defaults({"worker_consumer": "gpuinfer.worker.consumer:Consumer"})
    application.gpuinfer_settings = (lambda: settings) if settings else read
    return application


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]  # celery is not annotated
def _worker_init(sender: str, instance: Any, conf: Any, options: dict[str, Any], **_: object) -> None:
    """Prepare the process of any worker of this application, however it was started."""
    on_worker_init(sender, instance, conf, options)
