# SPDX-License-Identifier: Apache-2.0
"""The work itself: do workers answer, and does a request come back."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from gpuinfer.client import Client
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.lost import nobody, without
from gpuinfer.errors import GpuinferError, InferenceError, InputError, UnknownModel, WaitTimeout
from gpuinfer.models.examples import example, keys_to_set, sample
from gpuinfer.models.repository import ModelFolder, Repository
from gpuinfer.queue import catalogue, heartbeats
from gpuinfer.queue.depth import look

#: How long workers are given to answer a ping, and a request to come back.
PING_S, REQUEST_S = 2.0, 20.0


def workers(host: Host) -> Findings:
    """At least one worker answers, and each has loaded all its models; what waits for one is worked off."""
    with asked(host) as client:
        waiting, beats = look(client).total_waiting, heartbeats.fresh(client)
    names = alive(host)
    if not names:
        return nobody(host, waiting)
    return [ok(f"{len(names)} workers answer: {', '.join(names)}"), *without(host, beats)]


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
    task_id = client.submit(value, model=name, queue="realtime", priority=0, expires_s=REQUEST_S)
    try:
        client.result(task_id, REQUEST_S)
    except WaitTimeout:
        client.cancel(task_id)
        return warning(
            f"the request {task_id} for {name}, of the lowest priority, did not come back in {REQUEST_S:g} "
            "s, though a live worker serves that: it has more urgent work",
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
