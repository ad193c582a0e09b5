# SPDX-License-Identifier: Apache-2.0
"""The raw facts of one probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuinfer.doctor.host import Finding
from gpuinfer.queue.depth import Depth
from gpuinfer.view.model import Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts of one probe. Those from Redis are empty if Redis does not answer."""

    #: Redis's time, or this host's if Redis does not answer.
    now: float
    host: str
    version: str
    #: The address of Redis, as text.
    place: str
    reachable: bool = True
    depth: Depth | None = None
    #: Worker (``gpu0@host``) -> its last heartbeat, of any age.
    beats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: Host -> the last report of its watcher (see ``watcher.probe``).
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: ``outcome tier model`` -> tasks; None: this user may not ask.
    ended: Mapping[str, int] | None = None
    #: Redis's INFO.
    info: Mapping[str, Any] = field(default_factory=dict)
    #: ``appendfsync`` and ``means``; None: this user may not ask.
    durability: Mapping[str, str] | None = None
    #: The watchers' last decision.
    decision: Mapping[str, Any] | None = None
    #: Findings of the doctor's quick checks, without those that are ok.
    findings: Sequence[Finding] = ()
    #: This host's GPUs, in the form of ``watcher.probe``, if its watcher does not report them.
    gpus: Sequence[Mapping[str, Any]] = ()
    since_s: float = 3600.0
    curves: Sequence[Curve] = ()
    no_curves: str = ""
    access: Sequence[str] = ()
