# SPDX-License-Identifier: Apache-2.0
"""What a watcher keeps in Redis for its next process, and its last decisions for people.

Decisions are kept in Redis rather than read from the journal: one list has those of all hosts, and reading
it needs no rights on the journal. The journal has them too, for longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from gpuinfer.queue.fleet import silent_after
from gpuinfer.watcher.cooldown import Cooldown
from gpuinfer.watcher.memory import UnitMemory, booted
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import Decision, History
from gpuinfer.watcher.rates import PRIOR_WORKER_S, Rates
from gpuinfer.watcher.state import Key

#: Decisions kept, of all hosts together.
KEPT = 500
#: The rates that outlast a restart; what was counted since the last probe does not.
_RATES = ("served", "worked", "known", "startup_s")
_COOLDOWN = ("period_s", "changed_at", "last_up", "last_down")


class Unreadable(ValueError):
    """Raised when the memory has another form: of another version, or not written by a watcher."""


def pack(history: History, boot: str = "") -> bytes:
    """Return a history as JSON. ``boot``: the host's boot id."""
    return orjson.dumps(
        {
            "boot": boot,
            "parts": {
                name: {
                    "rates": {key: getattr(part.rates, key) for key in _RATES},
                    "cooldown": {key: getattr(part.cooldown, key) for key in _COOLDOWN},
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


class _Cooldown(BaseModel):
    period_s: float | None = None
    changed_at: float = 0.0
    last_up: float | None = None
    last_down: float | None = None


class _Part(BaseModel):
    rates: _Rates = _Rates()
    cooldown: _Cooldown = _Cooldown()

    def measured(self) -> Measured:
        return Measured(
            rates=Rates(**self.rates.model_dump()), cooldown=Cooldown(**self.cooldown.model_dump())
        )


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


def present(hosts: Mapping[bytes, bytes], now: float) -> dict[str, dict[str, Any]]:
    """Return what each host's watcher decides just now, in words, from what they tell each other.

    ``now``: on Redis's clock. With whether the watcher is alive, and how old its word is, in seconds.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, text in sorted(hosts.items()):
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # the other watchers log it
            body = orjson.loads(text)
            age_s = round(now - float(body["at"]), 1)
            alive, why = age_s <= silent_after(body), str(body.get("why") or "it has not decided yet")
            found[name.decode(errors="replace")] = {"alive": alive, "age_s": age_s, "why": why}
    return found


def told(entry: Mapping[str, Any], when: str) -> str:
    """Return a kept decision in a few lines for people."""
    numbers = {name: value for name, value in entry["inputs"].items() if name != "parts"}
    inputs = "  ".join(f"{name}={value}" for name, value in numbers.items())
    parts = [f"    {part}" for part in str(entry["inputs"].get("parts", "")).split("; ") if part]
    actions = [f"    {one['verb']} {one['instance']}: {one['why']}" for one in entry["actions"]]
    dry = "" if entry["done"] else " (only logged)"
    head = f"{when}  {entry['host']}  {entry['verdict']}{dry}: {entry['why']}"
    return "\n".join([head, *([f"    {inputs}"] if inputs else []), *parts, *actions])
