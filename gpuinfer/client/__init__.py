# SPDX-License-Identifier: Apache-2.0
"""The clients: what submits tasks, waits for their results and cancels them. Needs no torch and no Celery."""

from __future__ import annotations

from gpuinfer.client.aio import AsyncClient
from gpuinfer.client.sync import Client
from gpuinfer.queue.options import Options

__all__ = ["AsyncClient", "Client", "Options"]
