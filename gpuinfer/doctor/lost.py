# SPDX-License-Identifier: Apache-2.0
"""What no worker sees to: tasks that wait, dead letters, tasks at silent workers, models not loaded."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any

from gpuinfer import locks
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.units import idle_watcher, instances, show
from gpuinfer.queue import keys
from gpuinfer.queue.orphans import Holder, ago, command, holders

#: A dead letter older than this (seconds) has been forgotten by its administrator.
STALE_S = 7 * 86400
#: ActiveState of a unit -> why it does not answer: starting it again would not help.
_STATES = {
    "active": "runs, and cannot reach Redis or hangs",
    "activating": "is starting",
    "deactivating": "is stopping",
    "failed": "has failed",
}


def without(host: Host, beats: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Yield a warning for each model that a live worker should serve and could not load."""
    for worker, beat in sorted(beats.items()):
        for name, why in beat.get("missing", {}).items():
            number = worker.partition("@")[0].removeprefix("gpu")
            systemd = host.path("/run/systemd/system").is_dir() and worker.endswith(
                f"@{socket.gethostname()}"
            )
            restart = f"  # then: systemctl restart gpuinfer-worker@{number}" if systemd else ""
            yield warning(f"{worker} serves without {name}: {why}", f"gpuinfer model show {name}{restart}")


def nobody(host: Host, waiting: int) -> Finding:
    """Return the finding for a host on which no worker answers while tasks wait."""
    text = f"no worker answers, and {waiting} tasks wait"
    grave = error if waiting else warning
    try:
        there = [unit for unit in show(host, instances(host)) if unit["ActiveState"] in _STATES]
        idle = idle_watcher(host)
    except Skipped:
        return grave(text, "gpuinfer worker 0")
    if there:
        name, state = there[0]["Id"], _STATES[there[0]["ActiveState"]]
        return grave(f"{text}; {name} {state}", f"journalctl -u {name.removesuffix('.service')} -n 20")
    if idle:
        return grave(f"{text}; {idle}", "systemctl enable --now gpuinfer-worker@0")
    if waiting:
        return error(f"{text}; the watcher has not started one", "gpuinfer watcher explain")
    return ok("no worker runs, and no task waits; the watcher starts one when work comes")


def dead_letters(host: Host) -> Finding:
    """No task was set aside, or none so long ago that it is forgotten."""
    with asked(host) as client:
        count = int(client.hlen(keys.DEAD))
        oldest: list[Any] = client.zrange(keys.DEAD_AGES, 0, 0, withscores=True) if count else []
        seconds, _ = client.time()
    if not count:
        return ok("no dead letters")
    age_s = seconds - float(oldest[0][1]) if oldest else 0.0
    text = f"{count} dead letter{'s' if count > 1 else ''}"
    if age_s > STALE_S:
        text += f", the oldest of {age_s / 86400:.0f} days ago: nobody has looked at them"
    return warning(text, "gpuinfer dead list")


def orphans(host: Host) -> Findings:
    """No task lies at a worker that sends no heartbeat."""
    with asked(host) as client:
        found = holders(client)
    silent = [one for one in found if one.silent]
    return [_orphan(host, one) for one in silent] or ok(
        f"{sum(one.tasks for one in found)} tasks in flight, all at workers that send heartbeats"
    )


def _orphan(host: Host, one: Holder) -> Finding:
    """Return the finding for one silent worker: an error when no watcher will see to it any more."""
    text = f"{one.tasks} tasks lie at {one.worker}, which was silent for {ago(one.silent_s)}"
    here, settings = socket.gethostname(), host.settings
    lock = locks.state(settings.worker.run_dir, one.worker) if one.host == here else "free"
    if lock == "held":
        number = one.worker.partition("@")[0].removeprefix("gpu")
        return warning(f"{text}, though its process runs", f"journalctl -u gpuinfer-worker@{number} -n 20")
    if lock == "unknown":
        return warning(f"{text}; whether its process runs cannot be told", "sudo gpuinfer doctor work")
    after_s = settings.watcher.reap_after_s
    if after_s and one.silent_s < 2 * after_s:
        text += f"; a watcher puts them back after {ago(after_s)}"
        return warning(text, command(one.worker, here))
    return error(f"{text}; no watcher has put them back", command(one.worker, here))
