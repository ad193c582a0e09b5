# SPDX-License-Identifier: Apache-2.0
"""Reports decisions: to the journal when they are new, and in the unit's STATUS= at each probe."""

from __future__ import annotations

from collections.abc import Mapping

from sdnotify import SystemdNotifier

from gpuinfer.log import get_logger
from gpuinfer.watcher.policy import Decision
from gpuinfer.watcher.state import Observation

log = get_logger(__name__)


class Report:
    """Reports for one host's watcher."""

    def __init__(self, host: str, notifier: SystemdNotifier, *, acts: bool) -> None:
        self._host = host
        self._notifier = notifier
        self._acts = acts
        self._said: object = None
        self._rival = ""
        #: The first decision was made, and systemd has been told.
        self.ready = False

    def decision(self, decision: Decision, seen: Observation) -> bool:
        """Log a decision unless the last one was alike; set STATUS= in any case. Return whether it is new.

        How many workers are missing may change at each probe; only that some are missing counts as new.
        """
        names = ", ".join(f"{action.verb} {action.key}" for action in decision.of(self._host))
        own = [one for one in seen.instances if seen.owns(one.key)]
        running = sum(one.runs for one in own)
        verdict = decision.verdict if names else "hold"
        excluded = frozenset((key, why.reason, why.cause) for key, why in decision.excluded.items())
        topic = (verdict, names, running, _step(decision.inputs), excluded, seen.queues is None)
        more = {"actions": names, "done": self._acts} if names else {}
        new = self.trouble(topic, verdict, why=decision.why, **more, **decision.inputs)
        waiting = "Redis is away" if seen.queues is None else f"{seen.waiting:,} waiting"
        if self._rival:
            waiting = f"another watcher is called {self._host} too; {waiting}"
        count = f"{running} of {len(own)} workers of this host run"
        self._notifier.notify(f"STATUS={waiting}, {count}: {decision.why}")
        if not self.ready:
            self._notifier.notify("READY=1")
            self.ready = True
        return new

    def trouble(self, topic: object, action: str, **fields: object) -> bool:
        """Log a line unless the last one was about the same topic. Return whether it was logged."""
        if topic == self._said:
            return False
        self._said = topic
        log.info(action, **fields)
        return True

    def rival(self, token: str) -> None:
        """Log once that another watcher uses this host's name. ``token``: its process; empty: none."""
        if token and token != self._rival:
            reason = "another watcher publishes under this host's name"
            hint = "host names must differ, and each host has one watcher that acts"
            log.error("name_taken", host=self._host, reason=reason, hint=hint)
        self._rival = token


def _step(inputs: Mapping[str, object]) -> object:
    """Return how many of the instances are desired, and whether more are than there are."""
    desired, possible = inputs.get("desired"), inputs.get("possible")
    if not isinstance(desired, int) or not isinstance(possible, int):
        return None
    return min(desired, possible), desired > possible
