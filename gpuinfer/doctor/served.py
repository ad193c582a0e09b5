# SPDX-License-Identifier: Apache-2.0
"""Whether somebody serves what waits: which models in which queues, over all hosts of the fleet."""

from __future__ import annotations

import socket

from gpuinfer.doctor.bindings import served
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Findings, error, ok
from gpuinfer.doctor.host import Host
from gpuinfer.queue.depth import Lane, look
from gpuinfer.queue.fleet import Server, remedy, servers, serves_of


def waiting(host: Host) -> Findings:
    """Every task that waits is for a model and a queue that some worker serves, or would serve."""
    with asked(host) as client:
        depth, workers = look(client), [*servers(client), *_here(host)]
    counts = {lane: sum(levels.values()) for lane, levels in depth.lanes.items()}
    able = {one.serves for one in workers if not one.masked}
    return [
        error(f"{count} tasks wait in {_name(lane)}, which no worker serves", remedy(lane, workers))
        for lane, count in sorted(counts.items())
        if not any(serves.covers(lane) for serves in able)
    ] or ok(f"workers serve all that waits: {sum(counts.values())} tasks in {len(counts)} queues")


def _here(host: Host) -> list[Server]:
    """Return what this host's workers would serve by their settings."""
    name = socket.gethostname()
    return [
        Server(number, name, serves_of(settings.worker.queues, settings.worker.models))
        for number, settings in served(host)
    ]


def _name(lane: Lane) -> str:
    return f"{lane.tier} for {lane.model or 'the default model'}"
