# SPDX-License-Identifier: Apache-2.0
"""How a worker writes the ends of its tasks: the script ``settle``, with large results stored beside it.

Lua copies and hashes its arguments. So a large result is first written to a key of its own, by a plain SET,
and the script then renames that key. Nobody reads the key before that. An unused one expires within a minute;
if it has expired before the call, the result is sent as an argument.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import redis

from gpuinfer.log import get_logger
from gpuinfer.queue import keys, results
from gpuinfer.queue.claims import Final, following
from gpuinfer.queue.direct import Argument, Direct
from gpuinfer.settings import QueueSettings

log = get_logger(__name__)

#: A larger result is written to a key of its own.
BESIDE_BYTES = 64 * 1024


class Settling:
    """Settles what one worker has in flight."""

    def __init__(self, client: redis.Redis, direct: Direct, inflight: str, settings: QueueSettings) -> None:
        self._client = client
        self._settle = direct.bind("settle")
        self._inflight = inflight
        self._ttl_s = settings.result_ttl_s
        self._failed = (
            f"{settings.max_failed} {settings.max_failed_bytes} {settings.failed_ttl_s}"
            if settings.max_failed
            else ""
        )

    def settle(self, finals: Sequence[Final], *, idle: bool) -> dict[str, str]:
        """Write final states; return what was not kept (see ``Store.settle``). Raises redis-py's errors."""
        beside = self._set_beside(
            [final for final in finals if final.keep and len(final.meta) > BESIDE_BYTES]
        )
        try:
            not_kept, not_sent = self._call(finals, beside, idle=idle)
        except redis.ResponseError as exc:
            if "BESIDE" not in str(exc):  # BESIDE: a large result was evicted in between
                raise
            not_kept, not_sent = self._call(finals, (), idle=idle)
        log_refused(not_sent)
        return _pairs(not_kept)

    def _call(
        self, finals: Sequence[Final], beside: Collection[str], *, idle: bool
    ) -> tuple[list[bytes], list[bytes]]:
        """Return two lists of id, reason, id, reason, …: ends not stored, and successors not sent."""
        args: list[Argument] = [self._ttl_s, int(idle), len(finals), self._failed]
        for final in finals:
            seq = "" if final.seq is None else final.seq
            task_id, meta, keep = final.task_id, final.meta, str(int(final.keep))
            if not task_id:
                task_id, keep = final.parent, "" if final.parent else keep
            elif task_id in beside:
                meta, keep = results.notice(task_id, meta), "2"
            args += (seq, task_id, meta, keep, final.reply, final.label)
        args += following(finals)
        _, not_kept, not_sent = self._settle(keys=[self._inflight], args=args)
        return not_kept, not_sent

    def _set_beside(self, finals: Sequence[Final]) -> set[str]:
        """Write large results to keys of their own; return the ids of those written. A full Redis refuses
        them here, and accepts them only through the script."""
        if not finals:
            return set()
        with self._client.pipeline(transaction=False) as pipe:
            for final in finals:
                pipe.set(keys.beside(final.task_id), final.meta, ex=keys.BESIDE_VOID_S)
            answers = pipe.execute(raise_on_error=False)
        taken = set()
        for final, answer in zip(finals, answers, strict=True):
            if isinstance(answer, Exception) and not isinstance(answer, redis.exceptions.OutOfMemoryError):
                raise answer
            if not isinstance(answer, Exception):
                taken.add(final.task_id)
        return taken


def log_refused(not_sent: Sequence[bytes]) -> None:
    """Log the successors that Redis refused, and which were ended instead; id, reason, id, reason, …."""
    for task_id, reason in _pairs(not_sent).items():
        hint = "name the queue in queue.chain_queues; then gpuinfer redis apply-users grants the right to it"
        log.error("chain_refused", task_id=task_id, reason=reason, hint=hint)


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode(errors="replace") for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
