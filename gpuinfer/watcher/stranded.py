# SPDX-License-Identifier: Apache-2.0
"""What waits for a model or a queue that nothing serves, and the command that helps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpuinfer.log import get_logger
from gpuinfer.queue.depth import Lane
from gpuinfer.watcher.state import Instance, Key

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stranded:
    """Tasks that no worker will take as things are."""

    waiting: int
    #: The command that gets them a worker.
    remedy: str


class Reporter:
    """Says once when tasks begin to wait for nobody, and once when that has ended."""

    def __init__(self) -> None:
        self._said: frozenset[Lane] = frozenset()

    def report(self, stranded: Mapping[Lane, Stranded] | None) -> None:
        """Tell what is new. None: nothing is known just now."""
        if stranded is None:
            return
        for lane in sorted(stranded.keys() - self._said):
            found = stranded[lane]
            log.warning(
                "nothing_serves",
                queue=lane.tier,
                model=lane.model,
                waiting=found.waiting,
                reason="no worker that runs or could be started serves this model in this queue",
                hint=found.remedy,
            )
        for lane in sorted(self._said - stranded.keys()):
            log.info("served_again", queue=lane.tier, model=lane.model)
        self._said = frozenset(stranded)


def remedy(lane: Lane, instances: Iterable[Instance], out: Mapping[Key, str] | None = None) -> str:
    """Return the command by which the tasks of a lane that nothing serves get a worker.

    ``out``: why instances are not to be started.
    """
    known = sorted(instances, key=lambda one: one.key)
    reasons = out or {}
    for one in known:
        if one.serves.covers(lane):
            return f"{_start(one, reasons.get(one.key, one.out))}  # on {one.key.host}"
    same_model = [one for one in known if one.serves.models and lane.model in one.serves.models]
    chosen = next(iter(same_model or known), None)
    number = chosen.key.number if chosen else 0
    where = f" on {chosen.key.host}" if chosen else ""
    if same_model and chosen:
        tiers = ",".join((*chosen.serves.tiers, lane.tier))
        setting = f"GPUINFER_WORKER_QUEUES={tiers}"
    else:
        models = ",".join((*(chosen.serves.models if chosen else ()), lane.model))
        setting = f"GPUINFER_WORKER_MODELS={models}"
    file = f"/etc/gpuinfer/worker@{number}.env"
    return f"echo {setting} >> {file} && systemctl try-restart gpuinfer-worker@{number}  # for example{where}"


def _start(one: Instance, reason: str) -> str:
    """Return what starts an instance that serves it, and is kept from it."""
    unit = f"gpuinfer-worker@{one.key.number}"
    if one.masked:
        return f"systemctl unmask --now {unit}; systemctl start {unit}"
    if "watcher is silent" in reason:
        return "systemctl restart gpuinfer-watcher"
    return f"systemctl start {unit}"
