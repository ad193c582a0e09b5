# SPDX-License-Identifier: Apache-2.0
"""What a watcher keeps in Redis for its next life, and its last decisions for whoever asks.

Decisions are kept in Redis rather than read from the journal: one list has those of all hosts, and to
read it no rights on the journal are needed. The journal has them too, for longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

import orjson

from gpuinfer.watcher.calm import Calm
from gpuinfer.watcher.memory import UnitMemory
from gpuinfer.watcher.policy import Decision, History
from gpuinfer.watcher.rates import Rates
from gpuinfer.watcher.state import Key

#: Decisions kept, of all hosts together.
KEPT = 500
#: Of the rates, what holds over a restart; what was counted since the last look does not.
_RATES = ("served", "worked", "known", "startup_s")
_CALM = ("period_s", "changed_at", "last_up", "last_down")
Kept = TypeVar("Kept", Rates, Calm, UnitMemory)


def pack(history: History) -> bytes:
    """Return a history as JSON."""
    return orjson.dumps(
        {
            "rates": {name: getattr(history.rates, name) for name in _RATES},
            "calm": {name: getattr(history.calm, name) for name in _CALM},
            "units": [[*key, asdict(unit)] for key, unit in sorted(history.units.items())],
        }
    )


def unpack(text: bytes | None) -> History:
    """Return the history that was packed; an empty one when there is none, or another version wrote it."""
    try:
        body = orjson.loads(text or b"{}")
        return History(
            rates=_build(Rates, body.get("rates", {}), _RATES),
            calm=_build(Calm, body.get("calm", {}), _CALM),
            units={
                Key(int(number), str(host)): _build(
                    UnitMemory, unit, tuple(f.name for f in fields(UnitMemory))
                )
                for number, host, unit in body.get("units", [])
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return History()


def _build(kind: type[Kept], values: Mapping[str, Any], names: tuple[str, ...]) -> Kept:
    return kind(**{name: values[name] for name in names if name in values})


def note(decision: Decision, host: str, now: float, *, done: bool) -> dict[str, Any]:
    """Return a decision as it is logged and kept: verdict, this host's own actions, formula and inputs."""
    actions = decision.of(host)
    return {
        "at": now,
        "host": host,
        "verdict": decision.verdict if actions else "hold",
        "done": done,
        "why": decision.why,
        "actions": [
            {"verb": action.verb, "instance": str(action.key), "why": action.why} for action in actions
        ],
        "inputs": dict(decision.inputs),
    }


def told(entry: Mapping[str, Any], when: str) -> str:
    """Return a kept decision in a few lines for people."""
    inputs = "  ".join(f"{name}={value}" for name, value in entry["inputs"].items())
    actions = [f"    {one['verb']} {one['instance']}: {one['why']}" for one in entry["actions"]]
    dry = "" if entry["done"] else " (only logged)"
    head = f"{when}  {entry['host']}  {entry['verdict']}{dry}: {entry['why']}"
    return "\n".join([head, *([f"    {inputs}"] if inputs else []), *actions])
