# SPDX-License-Identifier: Apache-2.0
"""Where ``celery -A gpuinfer`` finds the application: ``inspect ping``, ``worker``, ``flower``."""

from __future__ import annotations

import sys

from gpuinfer.settings import Settings, load
from gpuinfer.worker.app import create_worker_app


def _read() -> Settings:
    """Read the settings; a worker runs model code, and root's must not have the administrator's password."""
    if "worker" in sys.argv:
        return load(user="worker", patient=True).settings
    return load(user="api").settings


app = create_worker_app(read=_read)

__all__ = ["app"]
