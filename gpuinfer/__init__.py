# SPDX-License-Identifier: Apache-2.0
"""gpuinfer: a queue-backed inference appliance for GPU hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuinfer.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the clients when first used, so that ``import gpuinfer`` stays light."""
    if name == "Client":
        from gpuinfer.client import Client

        return Client
    if name == "AsyncClient":
        from gpuinfer.client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
