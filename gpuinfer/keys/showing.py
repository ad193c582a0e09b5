# SPDX-License-Identifier: Apache-2.0
"""How ``gpuinfer key`` prints keys: as JSON, as a table, and a new token once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from gpuinfer.keys import key as keys
from gpuinfer.keys.key import Key
from gpuinfer.queue.show import print_json


def to_dict(one: Key, used: Mapping[str, float] | None) -> dict[str, Any]:
    """Return a key for JSON, without its hashes. ``used``: name -> Unix time of last use; None: not known."""
    at = None if used is None else used.get(one.name)
    return {
        "name": one.name,
        "role": one.role,
        "token": f"{one.prefix}..." if one.prefix else None,
        "models": list(one.models),
        "queues": list(one.queues),
        "rate": keys.rate_text(one.rate) if one.rate else None,
        "burst": one.burst or None,
        "max_waiting": one.max_waiting or None,
        "max_waiting_bytes": one.max_waiting_bytes or None,
        "weight": one.weight,
        "created": day(one.created),
        "expires": day(one.expires),
        "old_token_until": day(one.old_expires),
        "last_used": day(at),
    }


def row(one: Key, used: Mapping[str, float] | None) -> tuple[str, ...]:
    """Return a key's cells for a table."""
    limits = [keys.rate_text(one.rate)] if one.rate else []
    limits += [f"{one.max_waiting} waiting"] if one.max_waiting else []
    limits += [f"{one.max_waiting_bytes} B waiting"] if one.max_waiting_bytes else []
    limits += [f"weight {one.weight}"] if one.weight != 1 else []
    expired = one.expires is not None and one.expires <= time.time()
    return (
        one.name,
        one.role,
        f"{one.prefix}..." if one.prefix else "",
        ", ".join(limits) or "none",
        ", ".join(one.models) or "all",
        ", ".join(one.queues) or "all",
        "expired" if expired else day(one.expires) or "never",
        "not known" if used is None else day(used.get(one.name)) or "never",
    )


def day(at: float | None) -> str | None:
    """Return a Unix time as ``2027-01-31T12:00:00Z``."""
    return None if at is None else keys.time_text(at)


def print_token(one: Key, token: str, notes: Sequence[str], *, as_json: bool) -> None:
    """Print only the token on stdout, for ``TOKEN=$(gpuinfer key add shop)``; print the rest on stderr."""
    if as_json:
        print_json({**to_dict(one, {}), "token": token, "notes": list(notes)})
        return
    click.echo(token)
    click.echo(
        f"{one.name} ({one.role}) is valid within a second. The token is not shown again. Use it as:",
        err=True,
    )
    click.echo("  curl -H 'Authorization: Bearer gpi_...' http://HOST:8080/models", err=True)
    for text in notes:
        click.echo(f"note: {text}", err=True)
