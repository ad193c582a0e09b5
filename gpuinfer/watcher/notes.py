# SPDX-License-Identifier: Apache-2.0
"""What a watcher records in Redis: its history, for its next process, and its last decisions, for people.

One list in Redis has the decisions of all hosts, and reading it needs no rights on the journal. The journal
has them too, for longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import redis
from pydantic import BaseModel, ValidationError

from gpuinfer.errors import BrokerError
from gpuinfer.log import get_logger
from gpuinfer.queue.connection import explain, typed_errors
from gpuinfer.queue.fleet import silent_after
from gpuinfer.queue.scripts import bind
from gpuinfer.watcher.memory import UnitMemory, booted
from gpuinfer.watcher.part import Measured
from gpuinfer.watcher.policy import Decision, History
from gpuinfer.watcher.state import Key

log = get_logger(__name__)

#: The list of the last decisions of all hosts; and, before a host's name, what its watcher remembers.
DECISIONS = "gpuinfer:watcher:decisions"
MEMORY_PREFIX = "gpuinfer:watcher:memory:"
#: Record the history at least this often, even if no command has changed it.
KEEP_EVERY_S = 30.0
#: Decisions kept, of all hosts together.
KEPT = 500
#: The measurements that survive a restart; what was counted since the last probe does not.
_RATES = ("served", "worked", "known", "startup_s")
_COOLDOWN = ("period_s", "changed_at", "last_up", "last_down")


class Unreadable(ValueError):
    """Raised when the recorded history is not of our form: another version or another program wrote it."""


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
    """Return the history that was packed, as it is in this ``boot``; an empty one when there is none.

    Raises Unreadable.
    """
    if text is None:
        return History()
    try:
        kept = _Kept.model_validate_json(text)
        units = {Key(number, host): unit for number, host, unit in kept.units}
        return History(parts=kept.parts, units=units if kept.boot == boot else booted(units))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Unreadable(f"{place or 'it'}: {first['msg']}") from None


class _Kept(BaseModel):
    """The history as it is recorded; all else of rates and cooldowns is as at the start."""

    boot: str = ""
    parts: dict[str, Measured] = {}
    units: list[tuple[int, str, UnitMemory]] = []


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
    """Return each host's current decision in words (``why``), how old it is, and if its watcher is alive.

    ``hosts``: what the watchers publish; ``now``: on Redis's clock.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, text in sorted(hosts.items()):
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # unreadable: the watchers log that
            body = orjson.loads(text)
            age_s = round(now - float(body["at"]), 1)
            alive, why = age_s <= silent_after(body), str(body.get("why") or "it has not decided yet")
            found[name.decode(errors="replace")] = {"alive": alive, "age_s": age_s, "why": why}
    return found


def told(entry: Mapping[str, Any], when: str) -> str:
    """Return a recorded decision in a few lines for people."""
    numbers = {name: value for name, value in entry["inputs"].items() if name != "parts"}
    inputs = "  ".join(f"{name}={value}" for name, value in numbers.items())
    parts = [f"    {part}" for part in str(entry["inputs"].get("parts", "")).split("; ") if part]
    actions = [f"    {one['verb']} {one['instance']}: {one['why']}" for one in entry["actions"]]
    dry = "" if entry["done"] else " (only logged)"
    head = f"{when}  {entry['host']}  {entry['verdict']}{dry}: {entry['why']}"
    return "\n".join([head, *([f"    {inputs}"] if inputs else []), *parts, *actions])


class Keeper:
    """Records the history of one host's watcher. Blocking: call it in a thread."""

    def __init__(self, client: redis.Redis, host: str) -> None:
        self._client = client
        self._host = host
        self._write = bind(client, "keep")
        self._kept_at = 0.0
        #: The reasons that were logged last; the same one is not logged again.
        self._not_read = self._not_kept = ""

    def read(self) -> History | None:
        """Return the recorded history; None if there is none, or it cannot be read. Raises BrokerError."""
        try:
            with typed_errors():
                kept: bytes | None = self._client.get(MEMORY_PREFIX + self._host)  # type: ignore[assignment]
            history = unpack(kept, boot_id())
        except (Unreadable, BrokerError) as exc:
            if isinstance(exc, BrokerError) and not isinstance(exc.__cause__, redis.ResponseError):
                raise
            if str(exc) != self._not_read:
                hint = "rates are measured again; what was started or stopped by hand is forgotten"
                key = MEMORY_PREFIX + self._host
                log.warning("memory_unreadable", key=key, reason=str(exc), hint=hint)
            self._not_read = str(exc)
            return None
        self._not_read = ""
        return None if kept is None else history

    def due(self, now: float) -> bool:
        """Tell whether the history should be recorded again, even if nothing has changed."""
        return now - self._kept_at > KEEP_EVERY_S

    def keep(self, decision: Decision, now: float, *, new: bool, done: bool) -> None:
        """Record the history, and a ``new`` decision. If Redis refuses, they are in memory only."""
        entry = orjson.dumps(note(decision, self._host, now, done=done)) if new else b""
        self.keep_history(decision.history, now, entry)

    def keep_history(self, history: History, now: float, entry: bytes = b"") -> None:
        """Record the history, and a decision as JSON unless it is empty."""
        self._kept_at = now
        memory = pack(history, boot_id())
        try:
            self._write(keys=[MEMORY_PREFIX + self._host, DECISIONS], args=[memory, entry, KEPT])
        except (redis.RedisError, OSError) as exc:
            reason = str(explain(exc))
            if reason != self._not_kept:  # a full disk refuses it at each probe
                log.warning("notes_not_kept", reason=reason)
            self._not_kept = reason
        else:
            self._not_kept = ""

    def outdated(self) -> None:
        """Note that the history has changed since it was recorded."""
        self._kept_at = 0.0


@cache
def boot_id() -> str:
    """Return what changes with each boot of the host; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as exc:
        hint = "what was stopped by hand stays stopped after a boot"
        log.warning("boot_unknown", reason=str(exc), hint=hint)
        return ""
