# SPDX-License-Identifier: Apache-2.0
"""The work itself: do workers answer, are there dead letters, and does a request come back."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from gpuinfer import locks
from gpuinfer.client import Client
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.units import idle_watcher, instances, show
from gpuinfer.errors import GpuinferError, InferenceError, InputError, UnknownModel, WaitTimeout
from gpuinfer.models.examples import example, keys_to_set, sample
from gpuinfer.models.repository import ModelFolder, Repository
from gpuinfer.queue import catalogue, dead, heartbeats, keys
from gpuinfer.queue.depth import look
from gpuinfer.queue.orphans import Holder, ago, command, holders

#: How long workers are given to answer a ping, and a request to come back.
PING_S, REQUEST_S = 2.0, 20.0
#: A dead letter older than this (seconds) has been forgotten by its administrator.
STALE_S = 7 * 86400
#: ActiveState of a unit -> why it does not answer: starting it again would not help.
_STATES = {
    "active": "runs, and cannot reach Redis or hangs",
    "activating": "is starting",
    "deactivating": "is stopping",
    "failed": "has failed",
}
#: Of more than this the age is not looked for: each holds what was sent.
MOST_LETTERS = 1000


def workers(host: Host) -> Findings:
    """At least one worker answers, and each has loaded all its models; what waits for one is worked off."""
    with asked(host) as client:
        waiting, beats = look(client).total_waiting, heartbeats.fresh(client)
    names = alive(host)
    if not names:
        return nobody(host, waiting)
    return [ok(f"{len(names)} workers answer: {', '.join(names)}"), *_without(host, beats)]


def _without(host: Host, beats: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
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


def alive(host: Host) -> list[str]:
    """Return the workers that answer a ping, on whatever host. Raises Skipped when none may be asked."""
    from gpuinfer.queue.app import create_app

    app = create_app(host.settings)
    try:
        answers: list[dict[str, Any]] = app.control.ping(timeout=PING_S)
    except Exception as exc:
        raise Skipped(f"the workers cannot be asked: {type(exc).__name__}: {exc}") from None
    finally:
        app.close()
    return sorted(name for answer in answers for name in answer)


def dead_letters(host: Host) -> Finding:
    """No task was set aside, or none so long ago that it is forgotten."""
    with asked(host) as client:
        count = int(client.hlen(keys.DEAD))
        oldest = dead.letters(client)[0].at if 0 < count <= MOST_LETTERS else time.time()
    if not count:
        return ok("no dead letters")
    age_s = time.time() - oldest
    text = f"{count} dead letters"
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


def request(host: Host) -> Finding:
    """A request with a model's example, or zeros, comes back, the whole way through queue and worker."""
    settings = host.settings
    with asked(host) as client:
        client.ping()
    if not alive(host):
        raise Skipped("no worker runs that could answer a request; see work.workers")
    try:
        with asked(host) as client:
            fleet = catalogue.read(client)
        with Client(settings) as sender:
            return _round_trip(sender, _served(fleet, Repository(settings.models.folders)))
    except GpuinferError as exc:
        return error(f"the request failed: {exc} ({exc.code})", _log(host))


def _served(fleet: catalogue.Fleet, repository: Repository) -> ModelFolder:
    """Return a model that a live worker serves in realtime and that is installed here, the default one first.

    Raises Skipped.
    """
    for model in sorted(fleet.models.values(), key=lambda model: not model.default):
        if "realtime" in model.queues:
            with suppress(UnknownModel):
                return repository.get(model.name)
    raise Skipped(
        "no live worker serves a model of this host in the queue realtime; see gpuinfer queue status"
    )


def _round_trip(client: Client, folder: ModelFolder) -> Finding:
    started, name = time.monotonic(), folder.manifest.name
    value, given = sample(folder), example(folder) is not None
    if value is None:
        raise Skipped(f"{name} has no example to send; set inputs.NAME.example in its model.toml")
    task_id = client.submit(value, model=name, queue="realtime", priority=9, expires_s=REQUEST_S)
    try:
        client.result(task_id, REQUEST_S)
    except WaitTimeout:
        client.cancel(task_id)
        return error(
            f"the request {task_id} for {name} did not come back in {REQUEST_S:g} s, though a live "
            "worker serves that: it is busy",
            "gpuinfer queue status",
        )
    except (InputError, InferenceError) as exc:
        if given:
            raise
        text = f"{name} answers, and refuses a request of zeros: {exc.message}"
        return warning(text, f"gpuinfer model show {name}  # and set {keys_to_set(folder.manifest)}")
    return ok(f"a request for {name} came back after {(time.monotonic() - started) * 1000:.0f} ms")


def _log(host: Host) -> str:
    systemd = host.path("/run/systemd/system").is_dir()
    return "journalctl -u 'gpuinfer-worker@*' -p warning -n 20" if systemd else "gpuinfer queue status"
