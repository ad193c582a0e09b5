# SPDX-License-Identifier: Apache-2.0
"""Decides when a trouble is reported: once when it begins, once when it ends. Pure.

    troubles found by a probe ─► step(register before, troubles, now) ─► events, register after

A beginning is reported once the trouble has lasted for a while, an end once it has been gone for a while, so
that a trouble that comes and goes is not reported at every probe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from gpuinfer.queue.orphans import ago

Stage = Literal["began", "ended"]
#: Seconds that a trouble of this kind must last before it is reported: restarting Redis, or starting a
#: worker, takes a few.
HOLD_S: Mapping[str, float] = {"redis-away": 10.0, "no-worker": 10.0}
#: Seconds that a trouble must be gone before its end is reported.
GONE_S = 30.0


class Alert(NamedTuple):
    """One trouble."""

    #: Its kind, and what it concerns if there can be several: ``quarantine.gpu3``.
    name: str
    what: str
    #: The command that helps.
    remedy: str

    @property
    def kind(self) -> str:
        """Return its kind, such as ``quarantine``."""
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Known:
    """A trouble that exists, or was found gone less than ``GONE_S`` ago."""

    since: float
    what: str
    remedy: str
    #: Its beginning has been reported.
    told: bool = False
    #: When it was first found gone; 0: it still exists.
    gone: float = 0.0


class Event(NamedTuple):
    """A beginning or an end to report."""

    stage: Stage
    alert: Alert
    #: When the trouble began, in seconds since the epoch.
    since: float


Register = Mapping[str, Known]


def step(
    before: Register, present: Iterable[Alert], now: float, unknown: Iterable[str] = ()
) -> tuple[dict[str, Known], list[Event]]:
    """Return the register after a probe, and what to report. ``unknown``: kinds that could not be checked."""
    here, blind = {alert.name: alert for alert in present}, frozenset(unknown)
    after: dict[str, Known] = {}
    events: list[Event] = []
    for name in sorted({*before, *here}):
        alert, known = here.get(name), before.get(name)
        if alert is None:
            if known is None:
                continue
            gone = Alert(name, known.what, known.remedy)
            if gone.kind in blind:
                after[name] = known
            elif not known.told:
                continue
            elif now - (known.gone or now) < GONE_S:
                after[name] = replace(known, gone=known.gone or now)
            else:
                events.append(Event("ended", gone, known.since))
            continue
        known = known or Known(now, alert.what, alert.remedy)
        told = known.told or now - known.since >= HOLD_S.get(alert.kind, 0.0)
        if told and not known.told:
            events.append(Event("began", alert, known.since))
        after[name] = Known(known.since, alert.what, alert.remedy, told)
    return after, events


def told(event: Event, host: str, now: float) -> dict[str, str]:
    """Return the environment variables that tell the alert's command about an event."""
    alert = event.alert
    line = alert.what if event.stage == "began" else f"over after {ago(now - event.since)}: {alert.what}"
    return {
        "ALERT_NAME": alert.name,
        "ALERT_STATE": event.stage,
        "ALERT_HOST": host,
        "ALERT_SINCE": f"{event.since:.0f}",
        "ALERT_TEXT": line,
        "ALERT_REMEDY": alert.remedy if event.stage == "began" else "",
    }
