# SPDX-License-Identifier: Apache-2.0
"""Where ``celery -A gpuinfer`` finds the application: ``inspect ping``, ``worker``, ``flower``."""

from __future__ import annotations

from gpuinfer.worker.app import create_worker_app

app = create_worker_app()

__all__ = ["app"]
