# SPDX-License-Identifier: Apache-2.0
"""Which checks there are, in the order of the report, and how some of them are chosen."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from gpuinfer.doctor import (
    access,
    bindings,
    broker,
    clock,
    config,
    cuda,
    disk,
    durable,
    fleet,
    front,
    gpu,
    kernel,
    lost,
    models,
    nodes,
    redis_config,
    redis_tuning,
    served,
    units,
    versions,
    work,
)
from gpuinfer.doctor.check import LIMIT_S, Check
from gpuinfer.doctor.host import NVML_LIMIT_S
from gpuinfer.errors import UsageError

#: Those that ask NVML wait for its child process as well.
_GPU_LIMIT_S = NVML_LIMIT_S + 5.0


CHECKS: tuple[Check, ...] = (
    Check("config.file", config.file),
    Check("config.credentials", config.credentials),
    Check("versions.python", versions.python),
    Check("versions.libraries", versions.libraries),
    Check("versions.torch", cuda.torch, _GPU_LIMIT_S),
    Check("gpu.driver", gpu.driver, _GPU_LIMIT_S),
    Check("gpu.list", gpu.listed, _GPU_LIMIT_S),
    Check("gpu.mig", gpu.mig, _GPU_LIMIT_S),
    Check("gpu.persistence", gpu.persistence, _GPU_LIMIT_S),
    Check("gpu.health", gpu.health, _GPU_LIMIT_S),
    Check("gpu.memory", gpu.memory, _GPU_LIMIT_S),
    Check("gpu.xid", gpu.xid, _GPU_LIMIT_S),
    Check("gpu.nodes", nodes.nodes, _GPU_LIMIT_S),
    Check("gpu.binding", bindings.bindings, _GPU_LIMIT_S),
    Check("gpu.cuda", cuda.probe, _GPU_LIMIT_S + cuda.PROBE_LIMIT_S, slow=True),
    Check("redis.reach", broker.reach),
    Check("redis.version", broker.version),
    Check("redis.limits", redis_tuning.limits),
    Check("redis.durability", durable.durable),
    Check("redis.configured", redis_config.as_configured),
    Check("redis.users", redis_config.users),
    Check("redis.file", redis_tuning.file),
    Check("redis.memory", redis_tuning.usage),
    Check("redis.evictions", redis_tuning.evictions),
    Check("redis.unit", redis_tuning.unit_limit),
    Check("kernel.overcommit", kernel.overcommit),
    Check("kernel.somaxconn", kernel.somaxconn),
    Check("kernel.hugepages", kernel.huge_pages),
    Check("disk.data", disk.data),
    Check("disk.journal", disk.journal),
    Check("clock.synchronised", clock.synchronised),
    Check("clock.redis", clock.against_redis),
    Check("units.services", units.services),
    Check("units.workers", units.workers),
    Check("models.digest", models.digests, models.LOAD_LIMIT_S),
    Check("models.load", models.loads, 4 * models.LOAD_LIMIT_S, slow=True),
    Check("work.dead", lost.dead_letters),
    Check("work.orphans", lost.orphans),
    Check("work.workers", work.workers),
    Check("work.default", fleet.default_model),
    Check("work.served", served.waiting),
    Check("work.paused", served.paused),
    Check("work.drained", served.drained),
    Check("work.foreign", served.foreign),
    Check("work.api", front.ready),
    Check("access.connect", access.connect),
    Check("access.keys", access.keys),
    Check("work.request", work.request, LIMIT_S + work.REQUEST_S, slow=True),
)
NAMES = tuple(check.name for check in CHECKS)
TOPICS = tuple(dict.fromkeys(name.partition(".")[0] for name in NAMES))


def choose(words: Sequence[str] = (), *, quick: bool = False) -> tuple[Check, ...]:
    """Return the checks of these names and topics, or all. Raises UsageError for a word that is neither.

    A slow check that is named itself runs even when it should be quick.
    """
    for word in words:
        if word not in NAMES and word not in TOPICS:
            raise UsageError(_unknown(word), "CHECK")
    return tuple(check for check in CHECKS if _wanted(check, words, quick))


def _wanted(check: Check, words: Sequence[str], quick: bool) -> bool:
    if check.name in words:
        return True
    return (not words or check.name.partition(".")[0] in words) and not (quick and check.slow)


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word, [*NAMES, *TOPICS], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"topics are {', '.join(TOPICS)}"
    return f"there is no check {word!r}; {hint}"
