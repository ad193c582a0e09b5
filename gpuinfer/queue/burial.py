# SPDX-License-Identifier: Apache-2.0
"""How a worker moves tasks to the dead letters, and drops the oldest ones beyond the limits."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import redis

from gpuinfer.errors import GpuinferError
from gpuinfer.log import get_logger
from gpuinfer.queue import catalogue, keys, results
from gpuinfer.queue.chains import Chains
from gpuinfer.queue.claims import Final, following, label
from gpuinfer.queue.message import identify
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.settling import log_refused
from gpuinfer.settings import QueueSettings

log = get_logger(__name__)


class Burial:
    """Buries the tasks that one worker, or a reaper in its name, gives up."""

    def __init__(
        self,
        client: redis.Redis,
        worker: str,
        inflight: str,
        chains: Chains,
        settings: QueueSettings,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._worker = worker
        self._inflight = inflight
        self._chains = chains
        self._settings = settings
        self._clock = clock
        self._bury = bind(client, "bury")
        self._trim = bind(client, "trim")

    def bury(
        self,
        seq: int,
        list_key: str,
        payload: bytes,
        error: GpuinferError,
        *,
        deaths: int = 0,
        default_model: str = "",
    ) -> str:
        """Move a task from flight to the dead letters, with a failure result if its id can be read.

        ``default_model``: empty if not known. Returns the letter's id. Raises redis-py's errors.
        """
        task_id, reply = identify(payload)
        place = keys.place_of(list_key)
        model = place.model or default_model or catalogue.default_model(self._client) or ""
        letter_id = task_id or f"undecodable-{self._worker}-{int(self._clock() * 1000)}-{seq}"
        meta = b""
        if task_id:
            meta = results.failure(task_id, error, worker=self._worker, caller=place.caller)
        follows = self._chains.buried(payload, error, list_key)
        end = Final(
            seq, letter_id, meta, reply=reply, label=label("dead", place.tier, model), follows=follows
        )
        letter = self._letter(letter_id, list_key, payload, error, deaths)
        args = (seq, letter_id, letter, self._settings.result_ttl_s, meta, reply, end.label)
        log_refused(self._bury(keys=[self._inflight], args=[*args, *following([end])]))
        log.error(
            "task_dead_lettered",
            task_id=letter_id,
            queue=place.tier,
            **({"model": model} if model else {}),
            deaths=deaths,
            reason=error.message,
        )
        self.trim()
        return letter_id

    def _letter(
        self, letter_id: str, list_key: str, payload: bytes, error: GpuinferError, deaths: int
    ) -> bytes:
        return orjson.dumps(
            {
                "id": letter_id,
                "list": list_key,
                "reason": error.message,
                "code": error.code,
                "deaths": deaths,
                "worker": self._worker,
                "at": self._clock(),
                "payload": payload.decode("utf-8", "backslashreplace"),
            }
        )

    def trim(self) -> None:
        """Drop the dead letters beyond the limits, and log their ids. Raises redis-py's errors."""
        settings = self._settings
        bounds = settings.max_dead, settings.max_dead_bytes, settings.dead_ttl_s
        while dropped := self._trim(args=bounds):
            log.warning(
                "dead_letters_dropped",
                count=len(dropped),
                reason=f"at most {bounds[0]} are kept, of at most {bounds[1]} bytes, for {bounds[2]} s",
                hint="the oldest go first; queue.max_dead, max_dead_bytes and dead_ttl_s set the limits",
                task_ids=[letter_id.decode("utf-8", "backslashreplace") for letter_id in dropped],
            )
