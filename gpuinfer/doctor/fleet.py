# SPDX-License-Identifier: Apache-2.0
"""The fleet's models: is the default one set and known, and is there a worker for all that waits."""

from __future__ import annotations

from collections.abc import Sequence

from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.queue import catalogue, heartbeats
from gpuinfer.queue.catalogue import Unserved


def default_model(host: Host) -> Finding:
    """The fleet has a default model, for requests that name none, and it is one that the fleet knows."""
    with asked(host) as client:
        fleet = catalogue.read(client)
    name, known = fleet.default_model, fleet.known
    if not known:
        return ok("no worker has served a model yet; the first one sets the default model")
    choose = f"gpuinfer model default {known[0]}"
    if not name:
        return warning("no default model is set: requests must name their model", choose)
    if name not in known:
        return error(
            f"the default model {name} is not in the catalogue ({', '.join(known)}): requests that name no "
            "model are refused",
            choose,
        )
    return ok(f"the default model is {name}, of {len(known)} that the fleet knows")


def unserved(host: Host) -> Findings:
    """All tasks that wait are for a model and a queue that a live worker serves."""
    with asked(host) as client:
        if not heartbeats.fresh(client):
            raise Skipped("no worker lives; see work.workers")
        fleet = catalogue.read(client)
    return [warning(str(it), _remedy(host, it, fleet.known)) for it in fleet.unserved] or ok(
        "all that waits has a live worker"
    )


def _remedy(host: Host, it: Unserved, known: Sequence[str]) -> str:
    if not it.model:
        return f"gpuinfer model default {known[0]}" if known else "gpuinfer queue status"
    if host.path("/run/systemd/system").is_dir():
        return "gpuinfer watcher explain"
    return f"GPUINFER_WORKER_MODELS={it.model} GPUINFER_WORKER_QUEUES={it.tier} gpuinfer worker 1"
