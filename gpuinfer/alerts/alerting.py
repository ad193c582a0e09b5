# SPDX-License-Identifier: Apache-2.0
"""Reports troubles: a line in the journal, and a unit that runs the administrator's command.

``gpuinfer-alert@NAME:began.service`` is started when a trouble begins, ``...:ended`` when it ends. The
details are in an environment file of that name, which the unit reads. Which troubles have been reported
survives a restart: this host's are recorded in the unit's state folder, the fleet's in Redis, where the next
watcher that reports for the fleet reads them.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import redis
from pydantic import TypeAdapter, ValidationError

from gpuinfer.alerts.register import Alert, Event, Known, Register, step, told
from gpuinfer.errors import UnitRefused, UnitsUnavailable
from gpuinfer.log import get_logger

log = get_logger(__name__)

#: The Redis key of the fleet's register.
REGISTER = "gpuinfer:watcher:alerts"
_FILE = "alerts.json"
_REGISTER: TypeAdapter[dict[str, Known]] = TypeAdapter(dict[str, Known])
#: This host's kinds of trouble that cannot be checked while Redis is away.
OF_REDIS = ("redis-full",)

#: Starts ``gpuinfer-alert@`` with this instance name. Raises UnitRefused, UnitsUnavailable.
Start = Callable[[str], Awaitable[None]]


class Alerting:
    """Reports the troubles that one watcher finds."""

    def __init__(
        self,
        host: str,
        *,
        start: Start | None = None,
        state: Path | None = None,
        run: Path | None = None,
    ) -> None:
        """``start``: starts a unit; without it, only the journal is written. ``state``: the folder that
        survives a restart; ``run``: the folder of the units' environment files."""
        self._host = host
        self._start = start
        self._state = state
        self._run = run
        self._own: Register = {}
        self._fleet: Register = {}
        self._read = False
        #: Redis refused the fleet's register: it is in memory only.
        self._unkept = False
        #: "file" or "redis" -> the reason that was logged last.
        self._said: dict[str, str] = {}

    def update(
        self,
        client: redis.Redis,
        own: Iterable[Alert],
        fleet: Iterable[Alert] | None,
        now: float,
        *,
        away: bool,
    ) -> list[Event]:
        """Take what a probe found; return what to report. Blocking.

        ``fleet`` None: another watcher reports the fleet's troubles.
        """
        if not self._read:
            self._own, self._read = self._kept(), True
        register, events = step(self._own, own, now, OF_REDIS if away else ())
        if register != self._own:
            self._keep(register)
        self._own = register
        if fleet is None:
            self._unkept = False  # the register of the watcher that reports now is newer
        return events if away or fleet is None else [*events, *self._of_fleet(client, fleet, now)]

    def _of_fleet(self, client: redis.Redis, fleet: Iterable[Alert], now: float) -> list[Event]:
        try:
            known = self._fleet if self._unkept else self._known(client)
        except (redis.RedisError, OSError):
            return []  # what was reported is not known: the next probe reports the rest
        self._fleet, events = step(known, fleet, now)
        if self._fleet != known or self._unkept:
            try:
                client.set(REGISTER, _REGISTER.dump_json(dict(self._fleet)))
                self._unkept = False
                self._said.pop("redis", None)
            except (redis.RedisError, OSError) as exc:  # full: in memory until there is space
                self._unkept = True
                self._say_unkept("redis", str(exc))
        return events

    def _known(self, client: redis.Redis) -> Register:
        """Return the fleet's register from Redis; from memory when the key holds something else."""
        try:
            found: bytes | None = client.get(REGISTER)  # type: ignore[assignment]  # not decoded
        except redis.ResponseError:
            return self._fleet
        return _parsed(found or b"{}")

    def _say_unkept(self, where: str, reason: str) -> None:
        if reason != self._said.get(where):
            log.warning(
                "alerts_not_kept",
                reason=reason,
                hint="a restart may report the same trouble again",
            )
        self._said[where] = reason

    def _kept(self) -> Register:
        with suppress(OSError):
            return _parsed((self._state / _FILE).read_bytes()) if self._state is not None else {}
        return {}

    def _keep(self, register: Register) -> None:
        if self._state is None:
            return
        new = self._state / f"{_FILE}.new"
        try:
            new.write_bytes(_REGISTER.dump_json(dict(register)))
            new.replace(self._state / _FILE)
            self._said.pop("file", None)
        except OSError as exc:
            self._say_unkept("file", str(exc))

    async def tell(self, events: Iterable[Event], now: float) -> None:
        """Write to the journal, and start the units."""
        for event in events:
            alert = event.alert
            if event.stage == "began":
                log.warning("alert_began", alert=alert.name, reason=alert.what, hint=alert.remedy)
            else:
                log.info("alert_ended", alert=alert.name, reason=alert.what, since=round(event.since))
            if self._start is None or self._run is None:
                continue
            instance = f"{alert.name}:{event.stage}"
            try:
                write(self._run / f"{instance}.env", told(event, self._host, now))
                await self._start(instance)
            except (OSError, UnitRefused, UnitsUnavailable) as exc:
                log.error("alert_not_started", alert=instance, reason=str(exc))


def _parsed(text: bytes) -> dict[str, Known]:
    try:
        return _REGISTER.validate_json(text)
    except ValidationError:
        return {}


def write(path: Path, variables: Mapping[str, str]) -> None:
    """Write an environment file as systemd reads it: values in double quotes, one a line. Raises OSError."""
    lines = []
    for name, value in variables.items():
        plain = "".join(char if char.isprintable() else " " for char in value)
        quoted = plain.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`").replace("$", "\\$")
        lines.append(f'{name}="{quoted}"\n')
    path.write_text("".join(lines), encoding="utf-8")


def folder_of(variable: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder that systemd made for the unit (STATE_DIRECTORY, RUNTIME_DIRECTORY), or None."""
    named = environ.get(variable, "").partition(":")[0]
    return Path(named) if named else None
