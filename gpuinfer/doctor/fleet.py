# SPDX-License-Identifier: Apache-2.0
"""The work of the whole fleet, from Redis: what waits, what is held, and what no worker serves."""

from __future__ import annotations

import socket

from gpuinfer import locks
from gpuinfer.doctor.broker import asked
from gpuinfer.doctor.host import Finding, Findings, Host, error, ok, warning
from gpuinfer.doctor.redis_place import place_of
from gpuinfer.doctor.workers import served
from gpuinfer.plural import many, tasks_wait
from gpuinfer.queue import catalogue, drained, heartbeats, keys
from gpuinfer.queue.depth import is_paused
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.fleet import Server, quarantined, remedy, servers, serves_of
from gpuinfer.queue.orphans import Holder, ago, command, holders, parts


def default_model(host: Host) -> Finding:
    """The fleet has a default model, for requests that name none, and knows it."""
    with asked(host) as client:
        fleet = catalogue.read(client)
    name, known = fleet.default_model, fleet.known
    if not known:
        return ok("the fleet knows no model yet; the first worker sets the default model")
    if name in known:
        return ok(f"the default model is {name}, of {len(known)} that the fleet knows")
    text = f"the default model is {name or 'not set'}, and must be one of {', '.join(known)}"
    fix = f"gpuinfer model default {known[0]}"
    return (error if name else warning)(f"{text}: requests that name no model are refused", fix)


def workers(host: Host) -> Findings:
    """Workers send heartbeats, or no task waits for one; and each has loaded all its models."""
    with asked(host) as client:
        waiting, beats = read_depth(client).total_waiting, heartbeats.fresh(client)
    if waiting and not beats:
        fix = "gpuinfer doctor units; gpuinfer watcher explain; journalctl -u 'gpuinfer-worker@*' -n 20"
        fix = fix if host.booted else "gpuinfer worker 0"
        return error(f"no worker runs, and {tasks_wait(waiting)}", fix)
    running = many(len(beats), "worker runs", "workers run")
    found = [ok(f"{running}: {', '.join(sorted(beats)) or 'no task waits for one'}")]
    for worker, beat in sorted(beats.items()):
        number, its_host = parts(worker)
        for name, why in beat.get("missing", {}).items():
            first = f"gpuinfer model show {name}  # then"
            if why.startswith("there is no model "):
                first = f"gpuinfer model add FOLDER --name {name}  # or change worker.models; then"
            fix = f"{first}, on {its_host}: systemctl restart gpuinfer-worker@{number}"
            found.append(warning(f"{worker} serves without {name}: {why}", fix))
    return found


def dead_letters(host: Host) -> Finding:
    """There are no dead letters."""
    with asked(host) as client:
        count = int(client.hlen(keys.DEAD))
    return warning(many(count, "dead letter"), "gpuinfer dead list") if count else ok("no dead letters")


def orphans(host: Host) -> Findings:
    """No worker that holds tasks has stopped sending heartbeats."""
    with asked(host) as client:
        found = holders(client)
    sound = f"{many(sum(one.tasks for one in found), 'task')} in flight, all at workers that send heartbeats"
    return [_orphan(host, one) for one in found if one.silent] or ok(sound)


def _orphan(host: Host, one: Holder) -> Finding:
    """Return the finding for one silent worker: an error when no watcher will put its tasks back."""
    text = f"{one.worker} holds {many(one.tasks, 'task')} and has sent no heartbeat for {ago(one.silent_s)}"
    here, settings = socket.gethostname(), host.settings
    lock = locks.state(settings.worker.run_dir, one.worker) if one.host == here else "free"
    if lock == "held":
        look = f"journalctl -u gpuinfer-worker@{parts(one.worker)[0]} -n 20"
        return warning(f"{text}, though its process runs", look)
    if lock == "unknown":
        return warning(f"{text}; this user cannot tell whether its process runs", "sudo gpuinfer doctor work")
    after_s, fix = settings.watcher.reap_after_s, command(one.worker, here)
    if after_s and one.silent_s < 2 * after_s:
        return warning(f"{text}; a watcher puts them back after {ago(after_s)}", fix)
    return error(f"{text}; no watcher has put them back", fix)


def waiting(host: Host) -> Findings:
    """Some worker serves, or would serve, every task that waits; failures keep none from running."""
    name = socket.gethostname()
    with asked(host) as client:
        depth, workers = read_depth(client), servers(client)
    for number, settings in served(host):  # what this host's workers would serve by their settings
        workers.append(Server(number, name, serves_of(settings.worker.queues, settings.worker.models)))
    counts = {lane: sum(levels.values()) for lane, levels in sorted(depth.lanes.items())}
    bad = [error(*found) for found in quarantined(workers)]
    for lane, count in counts.items():
        if not any(one.serves.covers(lane) for one in workers if not one.masked):
            text = f"{tasks_wait(count)} in {lane.tier} for {lane.model or 'the default model'}"
            bad.append(error(f"{text}, which no worker serves", remedy(lane, workers)))
    what = f"{many(sum(counts.values()), 'task')} in {many(len(counts), 'queue')}"
    return bad or ok(f"workers serve all that waits: {what}")


def paused(host: Host) -> Findings:
    """No queue is paused and no worker is drained: somebody may have forgotten it."""
    with asked(host) as client:
        depth, workers = read_depth(client), drained.names(client)
    bad = []
    for name in depth.paused:
        count = sum(sum(levels.values()) for lane, levels in depth.lanes.items() if is_paused(lane, (name,)))
        bad.append(warning(f"{name} is paused: {tasks_wait(count)} there", f"gpuinfer queue resume {name}"))
    for worker in workers:
        number, its_host = parts(worker)
        text = f"{worker} is drained: it takes no tasks, also after a restart, until it is resumed"
        bad.append(warning(text, f"gpuinfer worker resume {number}  # on {its_host}"))
    return bad or ok("no queue is paused, no worker drained")


def foreign(host: Host) -> Findings:
    """Each key in Redis with the name of a queue, or of an index of queues, is one."""
    with asked(host) as client:
        found = read_depth(client).foreign
    bad = []
    for name, kind in found.items():
        quoted = name.encode("unicode_escape").decode().replace("'", "\\'")  # the shell's $'...' knows \x06
        delete = f"{place_of(host.settings.broker).cli} DEL $'{quoted}'"
        bad.append(error(f"{name!r} in Redis is a {kind}, not ours: its queue is not served", delete))
    return bad or ok("no other program's key has the name of a queue")
