# SPDX-License-Identifier: Apache-2.0
"""Whether somebody serves what waits: which models in which queues, over all hosts of the fleet."""

from __future__ import annotations

import socket

from gpuinfer.doctor.bindings import served
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.finding import Findings, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import place_of
from gpuinfer.queue.depth import Depth, Lane, is_paused, look
from gpuinfer.queue.drained import names
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


def paused(host: Host) -> Findings:
    """No queue is paused, which somebody may have forgotten."""
    with asked(host) as client:
        depth = look(client)
    return [
        warning(
            f"{name} is paused: {_count(depth, name)} wait there, and no worker takes them", _resume(name)
        )
        for name in depth.paused
    ] or ok("no queue is paused")


def _count(depth: Depth, name: str) -> str:
    lanes = [sum(levels.values()) for lane, levels in depth.lanes.items() if is_paused(lane, (name,))]
    return f"{sum(lanes)} tasks"


def _resume(name: str) -> str:
    return f"gpuinfer queue resume {name}"


def drained(host: Host) -> Findings:
    """No worker is drained, which somebody may have forgotten."""
    with asked(host) as client:
        found = names(client)
    here = socket.gethostname()
    return [
        warning(
            f"{worker} is drained: it takes no tasks, also after a restart, until it is resumed",
            f"gpuinfer worker resume {worker.partition('@')[0].removeprefix('gpu')}"
            + ("" if worker.endswith(f"@{here}") else f"  # on {worker.partition('@')[2]}"),
        )
        for worker in found
    ] or ok("no worker is drained")


def foreign(host: Host) -> Findings:
    """What has the name of a queue, or of an index of queues, is one."""
    with asked(host) as client:
        found = look(client).foreign
    return [
        error(
            f"{name!r} in Redis is a {kind}, not ours: what should be there is not served",
            place_of(host.settings.broker).cli(f"DEL $'{_escaped(name)}'"),
        )
        for name, kind in found.items()
    ] or ok("no key in Redis stands in the way of a queue")


def _escaped(name: str) -> str:
    r"""Return a key as the shell's $'...' takes it, which knows \x06."""
    return name.encode("unicode_escape").decode().replace("'", "\\'")


def _here(host: Host) -> list[Server]:
    """Return what this host's workers would serve by their settings."""
    name = socket.gethostname()
    return [
        Server(number, name, serves_of(settings.worker.queues, settings.worker.models))
        for number, settings in served(host)
    ]


def _name(lane: Lane) -> str:
    return f"{lane.tier} for {lane.model or 'the default model'}"
