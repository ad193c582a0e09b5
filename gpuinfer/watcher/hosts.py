# SPDX-License-Identifier: Apache-2.0
"""What the watchers of all hosts publish in one hash in Redis: their instances, and what they measured.

Another watcher is alive while its counter goes up, by our own clock; at first, by its age on Redis's clock.
The clocks of two hosts need not agree.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import orjson
import redis
from pydantic import TypeAdapter

from gpuinfer.log import get_logger
from gpuinfer.queue.fleet import HOSTS, silent_after, told
from gpuinfer.queue.scripts import bind
from gpuinfer.watcher.state import Figures, Instance, Key

log = get_logger(__name__)

#: Forget a watcher that has been silent for this long.
FORGOTTEN_S = 3600.0
_FIGURES: TypeAdapter[dict[str, Figures]] = TypeAdapter(dict[str, Figures])


class Heard(NamedTuple):
    """What the other hosts' watchers publish."""

    instances: list[Instance]
    #: Hosts whose watcher is alive, this one among them.
    live_hosts: frozenset[str]
    #: Host -> part of the fleet -> what its watcher has measured.
    figures: Mapping[str, Mapping[str, Figures]]
    #: The process token of another watcher that publishes under our host's name; empty: none.
    rival: str


@dataclass(slots=True)
class _Other:
    beat: int
    moved_at: float


class Hosts:
    """One host's entry in that hash, and its view of the others. Blocking: call it in a thread."""

    def __init__(
        self,
        client: redis.Redis,
        host: str,
        clock: Callable[[], float],
        *,
        interval_s: float,
        tell: bool,
    ) -> None:
        """``interval_s``: how often ``exchange`` is called. Without ``tell`` it only reads."""
        self._client = client
        self._host = host
        self._clock = clock
        self._interval_s = interval_s
        self._tells = tell
        self._share = bind(client, "tell")
        self._token = secrets.token_hex(8)
        self._has_told = False
        self._beat = int(time.time() * 1000)
        self._others: dict[str, _Other] = {}
        self._garbled: set[str] = set()

    def exchange(
        self,
        own: Sequence[Instance],
        now: float,
        figures: Mapping[str, Figures],
        more: Mapping[str, object],
    ) -> Heard:
        """Publish our instances and figures, and ``more`` for people; return what the others publish.

        Raises redis-py's errors.
        """
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hget(HOSTS, self._host) if self._tells else pipe.hgetall(HOSTS)
            (seconds, microseconds), found = pipe.execute()
        redis_now, rival = seconds + microseconds / 1e6, ""
        if self._tells:
            token = _token_of(found)
            rival = token if self._has_told and token != self._token else ""
            self._beat += 1
            body = {
                "token": self._token,
                "beat": self._beat,
                "at": redis_now,
                "interval_s": self._interval_s,
                "figures": {name: asdict(measured) for name, measured in figures.items()},
                "instances": [_told(instance, now) for instance in own],
                **more,
            }
            flat: list[bytes] = self._share(keys=[HOSTS], args=[self._host, orjson.dumps(body)])
            found = dict(zip(flat[::2], flat[1::2], strict=True))
            self._has_told = True
        return self._hear(found, redis_now, now, rival)

    def _hear(self, found: Mapping[bytes, bytes], redis_now: float, now: float, rival: str) -> Heard:
        instances: list[Instance] = []
        live = {self._host}
        figures: dict[str, Mapping[str, Figures]] = {}
        for name, text in found.items():
            host = name.decode(errors="replace")
            if host == self._host:
                continue
            try:
                body = orjson.loads(text)
                theirs = [_heard(host, one, now) for one in body["instances"]]
                measured = _FIGURES.validate_python(body.get("figures") or {})
                beat, limit_s = body["beat"], silent_after(body)
                age_s = max(0.0, redis_now - float(body.get("at", redis_now)))
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                if host not in self._garbled:
                    log.warning("host_unreadable", host=host, reason=f"{type(exc).__name__}: {exc}")
                self._garbled.add(host)
                continue
            self._garbled.discard(host)
            silent_s = self._silent_s(host, beat, age_s)
            if silent_s > FORGOTTEN_S:
                self._forget(host)
                continue
            if silent_s <= limit_s:
                live.add(host)
                figures |= {host: measured} if measured else {}
            instances += theirs
        return Heard(instances, frozenset(live), figures, rival)

    def _silent_s(self, host: str, beat: int, age_s: float) -> float:
        """Return for how long a watcher has published nothing new."""
        other = self._others.setdefault(host, _Other(beat, self._clock() - age_s))
        if other.beat != beat:
            other.beat, other.moved_at = beat, self._clock()
        return self._clock() - other.moved_at

    def _forget(self, host: str) -> None:
        if self._tells:
            self._client.hdel(HOSTS, host)
        del self._others[host]


def _token_of(text: bytes | None) -> str:
    """Return the token of the watcher process that wrote an entry; empty where it has none."""
    try:
        return str(orjson.loads(text or b"{}").get("token", ""))
    except (ValueError, AttributeError):
        return ""


def _told(instance: Instance, now: float) -> dict[str, object]:
    return {
        "number": instance.key.number,
        "state": instance.state,
        "age_s": round(now - instance.since, 3),
        "enabled": instance.enabled,
        "masked": instance.masked,
        "hold": instance.hold,
        "excluded": instance.excluded,
        "log_only": instance.log_only,
        "tiers": instance.serves.tiers,
        "models": instance.serves.models,
    }


def _heard(host: str, one: Mapping[str, Any], now: float) -> Instance:
    return Instance(
        key=Key(int(str(one["number"])), host),
        state=one["state"],
        since=now - float(str(one["age_s"])),
        enabled=bool(one["enabled"]),
        masked=bool(one["masked"]),
        hold=one["hold"],
        excluded=str(one["excluded"]),
        log_only=bool(one.get("log_only")),
        serves=told(one),
    )
