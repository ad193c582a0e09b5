# SPDX-License-Identifier: Apache-2.0
"""How a worker writes the ends of its tasks: the script ``settle``, and large results beside it.

What passes through Lua is copied and hashed there. A large result is set under a key of its own before the
call, by a plain SET, and the script renames that key. Until then nobody reads it; what is not used expires
within a minute, and what has expired before the call is sent whole.
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

#: A result with more bytes is set beside.
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
            if "BESIDE" not in str(exc):  # else one was evicted in between
                raise
            not_kept, not_sent = self._call(finals, (), idle=idle)
        log_refused(not_sent)
        return _pairs(not_kept)

    def _call(
        self, finals: Sequence[Final], beside: Collection[str], *, idle: bool
    ) -> tuple[list[bytes], list[bytes]]:
        """Return two lists of id, reason, id, reason, …: what was not kept, what follows and was not sent."""
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
        """Set large results beside; return the ids of those that Redis has taken. A full one takes them by
        script alone."""
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
    """Log the tasks of chains that Redis did not accept, which ended them; id, reason, id, reason, …."""
    for task_id, reason in _pairs(not_sent).items():
        hint = (
            "queue.chain_queues names where chains may go on; gpuinfer redis apply-users gives the right to"
        )
        log.error("chain_refused", task_id=task_id, reason=reason, hint=hint)


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode(errors="replace") for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
