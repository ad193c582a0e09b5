# SPDX-License-Identifier: Apache-2.0
"""The Celery application that all programs share; ``gpuinfer.celery`` adds what a worker needs.

Settings are read when Celery first asks for its configuration, not at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from gpuinfer.queue import transport
from gpuinfer.queue.connection import celery_options, celery_urls, tls_options
from gpuinfer.queue.message import ROUTES
from gpuinfer.settings import QUEUES, Settings, load_settings


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's configuration for our settings."""
    broker_url, backend_url = celery_urls(settings.broker)
    tls = tls_options(settings.broker)
    transport_options, of_results = celery_options(settings.broker)
    return {
        "broker_url": broker_url,
        "result_backend": backend_url,
        "broker_use_ssl": tls,
        "redis_backend_use_ssl": tls,
        "broker_transport_options": {
            "queue_settings": settings.queue.model_dump(),
            **transport_options,
        },
        **of_results,
        # The default exchange: a task goes to the queue its routing key names, and no binding is stored.
        "task_queues": [Queue(name, Exchange(""), routing_key=name) for name in QUEUES],
        "task_default_queue": "default",
        "task_default_exchange": "",
        "task_default_routing_key": "default",
        "task_routes": {task: {"queue": queue} for task, queue in ROUTES.items()},
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_acks_late": True,
        "task_track_started": True,
        "result_expires": settings.queue.result_ttl_s,
        "worker_prefetch_multiplier": 1,
        "worker_concurrency": 1,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # READONLY and MISCONF are temporary; the worker waits them out (gpuinfer.worker.consumer).
        "broker_channel_error_retry": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def create_app(settings: Settings | None = None, read: Callable[[], Settings] = load_settings) -> Celery:
    """Return the application; without settings, they are read when first needed."""
    transport.register()
    application = Celery("gpuinfer", include=["gpuinfer.queue.tasks"], set_as_current=False)
    application.add_defaults(lambda: celery_config(settings or read()))
    return application
