# SPDX-License-Identifier: Apache-2.0
"""What a watcher keeps in Redis for its next process, and its last decisions for its readers.

Decisions are kept in Redis rather than read from the journal: one list has those of all hosts, and to
read it no rights on the journal are needed. The journal has them too, for longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from gpuinfer.watcher.calm import Calm
from gpuinfer.watcher.memory import UnitMemory, booted
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import Decision, History
from gpuinfer.watcher.rates import PRIOR_WORKER_S, Rates
from gpuinfer.watcher.state import Key

#: Decisions kept, of all hosts together.
KEPT = 500
#: Of the rates, what holds over a restart; what was counted since the last look does not.
_RATES = ("served", "worked", "known", "startup_s")
_CALM = ("period_s", "changed_at", "last_up", "last_down")


class Unreadable(ValueError):
    """Raised for a memory that is not in our form: of another version, or not written by a watcher."""


def pack(history: History, boot: str = "") -> bytes:
    """Return a history as JSON. ``boot``: the host's boot id."""
    return orjson.dumps(
        {
            "boot": boot,
            "parts": {
                name: {
                    "rates": {key: getattr(part.rates, key) for key in _RATES},
                    "calm": {key: getattr(part.calm, key) for key in _CALM},
                }
                for name, part in sorted(history.parts.items())
            },
            "units": [[*key, asdict(unit)] for key, unit in sorted(history.units.items())],
        }
    )


def unpack(text: bytes | None, boot: str = "") -> History:
    """Return the history that was packed, as it is after ``boot``; an empty one when there is none.

    Raises Unreadable.
    """
    if text is None:
        return History()
    try:
        kept = _KEPT.validate_json(text)
        history = kept.history()
        return history if kept.boot == boot else replace(history, units=booted(history.units))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Unreadable(f"{place or 'it'}: {first['msg']}") from None


class _Rates(BaseModel):
    served: float | None = None
    worked: float = PRIOR_WORKER_S
    known: bool = False
    startup_s: float | None = None


class _Calm(BaseModel):
    period_s: float | None = None
    changed_at: float = 0.0
    last_up: float | None = None
    last_down: float | None = None


class _Part(BaseModel):
    rates: _Rates = _Rates()
    calm: _Calm = _Calm()

    def measured(self) -> Measured:
        return Measured(rates=Rates(**self.rates.model_dump()), calm=Calm(**self.calm.model_dump()))


class _Memory(BaseModel):
    boot: str = ""
    parts: dict[str, _Part] = {}
    units: list[tuple[int, str, UnitMemory]] = []

    def history(self) -> History:
        return History(
            parts={name: part.measured() for name, part in self.parts.items()},
            units={Key(number, host): unit for number, host, unit in self.units},
        )


_KEPT = TypeAdapter(_Memory)


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
    numbers = {name: value for name, value in entry["inputs"].items() if name != "parts"}
    inputs = "  ".join(f"{name}={value}" for name, value in numbers.items())
    parts = [f"    {part}" for part in str(entry["inputs"].get("parts", "")).split("; ") if part]
    actions = [f"    {one['verb']} {one['instance']}: {one['why']}" for one in entry["actions"]]
    dry = "" if entry["done"] else " (only logged)"
    head = f"{when}  {entry['host']}  {entry['verdict']}{dry}: {entry['why']}"
    return "\n".join([head, *([f"    {inputs}"] if inputs else []), *parts, *actions])
