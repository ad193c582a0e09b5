# SPDX-License-Identifier: Apache-2.0
"""The clients: submit tasks, wait for results, cancel. They need neither torch nor Celery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuinfer.client.aio import AsyncClient
    from gpuinfer.client.sync import Client
    from gpuinfer.queue.options import Options

__all__ = ["AsyncClient", "Client", "Options"]


def __getattr__(name: str) -> Any:
    """Import the clients on first use, so that shell completion does not load redis-py."""
    if name == "Client":
        from gpuinfer.client.sync import Client

        return Client
    if name == "AsyncClient":
        from gpuinfer.client.aio import AsyncClient

        return AsyncClient
    if name == "Options":
        from gpuinfer.queue.options import Options

        return Options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
