# SPDX-License-Identifier: Apache-2.0
"""The clients: what submits tasks, waits for their results and cancels them. Needs no torch and no Celery."""

from __future__ import annotations

from gpuinfer.client.aio import AsyncClient
from gpuinfer.client.core import Options
from gpuinfer.client.sync import Client

__all__ = ["AsyncClient", "Client", "Options"]
