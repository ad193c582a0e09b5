# SPDX-License-Identifier: Apache-2.0
"""Which checks there are, in the order of the report, and how some of them are chosen."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from gpuinfer.doctor import access, broker, fleet, gpu, system, units, work, workers
from gpuinfer.doctor.check import LIMIT_S, Check
from gpuinfer.errors import UsageError

CHECKS: tuple[Check, ...] = (
    Check("config.file", workers.file),
    Check("config.credentials", access.credentials),
    Check("versions.torch", gpu.torch),
    Check("gpu.driver", gpu.driver),
    Check("gpu.health", gpu.health),
    Check("gpu.memory", gpu.memory),
    Check("gpu.xid", gpu.xid),
    Check("gpu.binding", workers.bindings),
    Check("gpu.cuda", gpu.probe, LIMIT_S + gpu.PROBE_LIMIT_S, slow=True),
    Check("redis.reach", broker.reach),
    Check("redis.limits", broker.limits),
    Check("redis.durability", broker.durable),
    Check("redis.configured", broker.as_configured),
    Check("redis.users", broker.users),
    Check("redis.file", broker.file),
    Check("redis.memory", broker.usage),
    Check("kernel.overcommit", system.overcommit),
    Check("disk.data", system.data),
    Check("disk.journal", system.journal),
    Check("clock.redis", system.clocks),
    Check("units.services", units.services),
    Check("units.workers", units.workers),
    Check("models.digest", workers.digests, workers.DIGEST_LIMIT_S),
    Check("work.dead", fleet.dead_letters),
    Check("work.orphans", fleet.orphans),
    Check("work.workers", fleet.workers),
    Check("work.default", fleet.default_model),
    Check("work.served", fleet.waiting),
    Check("work.paused", fleet.paused),
    Check("work.foreign", fleet.foreign),
    Check("work.api", work.ready),
    Check("access.connect", access.connect),
    Check("access.keys", access.keys),
    Check("work.request", work.request, LIMIT_S + work.REQUEST_S, slow=True),
)
NAMES = tuple(check.name for check in CHECKS)
TOPICS = tuple(dict.fromkeys(name.partition(".")[0] for name in NAMES))


def choose(words: Sequence[str] = (), *, quick: bool = False) -> tuple[Check, ...]:
    """Return the checks of these names and topics, or all. Raises UsageError for a word that is neither."""
    for word in words:
        if word not in NAMES and word not in TOPICS:
            close = difflib.get_close_matches(word, [*NAMES, *TOPICS], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"topics are {', '.join(TOPICS)}"
            raise UsageError(f"there is no check {word!r}; {hint}", "CHECK")
    named = [check for check in CHECKS if {check.name, check.name.partition(".")[0]} & {*words} or not words]
    # A slow check that is named runs even if ``quick``.
    return tuple(check for check in named if not (quick and check.slow) or check.name in words)
