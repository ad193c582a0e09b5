# SPDX-License-Identifier: Apache-2.0
"""Metadata of a task's state beside its result: its origin, and how it ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpuinfer.errors import InputError
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.keys import place_of
from gpuinfer.queue.message import Envelope, moment_of


def about(
    claimed: Claimed,
    envelope: Envelope,
    versions: Mapping[str, str],
    model: str = "",
    ran_s: float = 0.0,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Return ``TaskStatus.about``. Default values are left out to save memory: there may be millions of
    results.

    ``model``: the one that ran, if known; ``ran_s``: the seconds of its batches, the largest of which had
    ``batch_size`` inputs.
    """
    place = place_of(claimed.list_key)
    model = model or claimed.model
    found: dict[str, Any] = {"queue": place.tier, "model": model}
    if version := versions.get(model):
        found["version"] = version
    if place.priority:
        found["priority"] = place.priority
    if envelope.deliveries:
        found["attempt"] = envelope.deliveries + 1
    if batch_size:
        found["run_ms"], found["batch_size"] = round(ran_s * 1000, 3), batch_size
    if envelope.headers.get("expires") is not None and (at := _expiry(envelope)) is not None:
        found["expires"] = at
    if (metadata := envelope.metadata) is not None:
        found["metadata"] = metadata
    if traceparent := envelope.traceparent:
        found["traceparent"] = traceparent
    return found


def _expiry(envelope: Envelope) -> float | None:
    try:
        return moment_of(envelope.headers, "expires")
    except InputError:
        return None
