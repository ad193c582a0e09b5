# SPDX-License-Identifier: Apache-2.0
"""Putting tasks back in many small calls, so that Redis serves others in between.

Each call is atomic: a task is either in flight or in its list. If the process dies between two calls, the
remaining tasks are still in flight, and the next restore puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from gpuinfer.log import get_logger
from gpuinfer.queue.direct import Argument

log = get_logger(__name__)

#: Maximum tasks and bytes of one call, so that it blocks Redis for less than 10 ms.
CALL_TASKS, CALL_BYTES = 250, 512 * 1024
#: A restore returns at most this many ids.
MOST_IDS = 1000

Script = Callable[..., Any]

#: Lists already logged because their key has another type.
_named: set[bytes] = set()


def release(
    script: Script, inflight: str, seqs: Iterable[int], ran: Collection[int], models: Mapping[int, str]
) -> tuple[int, int]:
    """Put claimed tasks back, the last claimed first: each goes to the head of its list.

    Those in ``models`` are passed on to another model's list, the first claimed first. Returns how many were
    put back, and how many stay in flight because their list's key has another type, which is logged. Raises
    redis-py's errors.
    """
    ordered = sorted(seqs)
    entries = [(seq, int(seq in ran), "") for seq in reversed(ordered) if seq not in models]
    entries += [(seq, 0, models[seq]) for seq in ordered if seq in models]
    back = stay = 0
    while entries:
        parts = [part for entry in entries[:CALL_TASKS] for part in entry]
        done, count, stuck = script(keys=[inflight], args=[CALL_BYTES, *parts])
        del entries[:done]
        back += count
        stay += _tell_of_stuck(stuck)
    return back, stay


def restore(
    script: Script, keys: Sequence[str], seqs: Iterable[int], args: tuple[Argument, Argument]
) -> tuple[int, list[bytes], list[tuple[bytes, bytes, bytes, int]]]:
    """Put back what a dead worker has in flight, the last claimed first.

    ``keys``: its in-flight hash and epoch; ``args``: the epoch begun for this restore, and the number of
    deaths at which a task is given up. Returns how many were put back, the ids of the first thousand of them,
    and (seq, list, payload, deaths) of each task to give up. A task whose list's key has another type stays
    in flight, which is logged. Raises redis-py's errors; the text contains STALE if a later epoch has begun.
    """
    left = sorted(seqs, reverse=True)
    back = 0
    ids: list[bytes] = []
    dead: list[tuple[bytes, bytes, bytes, int]] = []
    while True:
        part = left[:CALL_TASKS]
        last = int(len(part) == len(left))
        done, count, names, stuck, *flat = script(keys=keys, args=[*args, CALL_BYTES, last, *part])
        del left[:done]
        back += count
        _tell_of_stuck(stuck)
        ids += names[: MOST_IDS - len(ids)]
        dead += zip(*(flat[i::4] for i in range(4)), strict=True)
        if not left:
            return back, ids, dead


def _tell_of_stuck(stuck: Sequence[bytes]) -> int:
    """Log, once for each list, that its tasks cannot be put back; return the number of these tasks."""
    for name, reason in zip(stuck[::2], stuck[1::2], strict=True):
        if name not in _named:
            _named.add(name)
            hint = "delete or rename that key; until then its tasks stay in flight; other lists are served"
            log.error("not_put_back", key=name.decode(), reason=reason.decode(), hint=hint)
    return len(stuck) // 2
