# SPDX-License-Identifier: Apache-2.0
"""Moves tasks for another model that plain Celery producers put into the default model's lists.

A worker of the default model does this when it claims such a task. While no such worker is alive, any worker
of the tier searches these lists. It moves the tasks for other models to those models' lists, and ends tasks
for unknown models. The default model's own tasks keep waiting.

This claims no tasks, so if the process dies no task is charged with the death. Therefore tasks that may be
dangerous to read are left to a worker of the default model, and so are those behind ``MOST_READ`` others: to
remove a task from a list, Redis has to traverse all tasks before it. Far from the head of a list, each pass
moves only a few tasks, and each call even fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpuinfer.errors import PayloadTooLarge, UnknownModel
from gpuinfer.log import get_logger
from gpuinfer.names import MODEL_NAME
from gpuinfer.queue import catalogue, heartbeats, keys, results
from gpuinfer.queue.claims import Final, Stray, label
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.message import Envelope, Undecodable, peek, tasks_by_name
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import QueueSettings

log = get_logger(__name__)

#: Maximum tasks of one list, and approximate bytes, read by one pass: a long backlog is read in parts.
WINDOW, WINDOW_BYTES = 500, 1024 * 1024
#: A message, or its arguments, larger than this is not read.
UNPACKED_BYTES = 1024 * 1024
#: Only this many tasks of a list are read, from the next to be served.
MOST_READ = 20_000
#: Up to this many tasks, or bytes, from the head, a call pops all tasks and pushes back those that stay.
#: Further on this would block Redis for over 10 ms, so each task is searched for, which takes up to 3 ms: at
#: most ``FAR_CALL`` tasks per call, and ``FAR_PASS`` per pass.
MOST_MOVED, MOST_MOVED_BYTES = 5_000, 2 * 1024 * 1024
FAR_CALL, FAR_PASS = 3, 30


class Router:
    """Searches the default model's lists, a part at a time."""

    def __init__(self, store: Store, settings: QueueSettings) -> None:
        self._store = store
        self._result_ttl_s = settings.result_ttl_s
        #: Names of our tasks; other tasks are not passed on.
        self._names = tasks_by_name(settings)
        self._route = bind(store.client, "route")
        #: List -> how many of its tasks, from the next to be served, were already read, and their bytes.
        self._read: dict[str, tuple[int, int]] = {}

    def pass_on(self) -> int:
        """Do one pass over the lists; return how many tasks were passed on. Raises redis-py's errors."""
        client, store = self._store.client, self._store
        default = catalogue.default_model(client)
        if not default or default in store.models:
            return 0
        seconds, microseconds = client.time()
        alive_at = seconds + microseconds / 1e6 - heartbeats.FRESH_S
        passed = 0
        for tier in store.queues:
            if client.zcount(f"{keys.GROUPS_PREFIX}{tier}.{default}", alive_at, "+inf"):
                continue
            lists = keys.lists([tier])
            for key, size in zip(lists, self._sizes(lists), strict=True):
                passed += self._search(key, size, default) if size else 0
        return passed

    def _sizes(self, lists: list[str]) -> list[int]:
        with self._store.client.pipeline(transaction=False) as pipe:
            for key in lists:
                pipe.llen(key)
            return [int(size) for size in pipe.execute()]

    def _search(self, key: str, size: int, default: str) -> int:
        read, read_bytes = self._read.get(key, (0, 0))
        if read >= min(size, MOST_READ):
            read, read_bytes = 0, 0
        client = self._store.client
        next_one: bytes = client.lindex(key, -read - 1) or b""  # type: ignore[assignment]  # not decoded
        window = max(1, min(WINDOW, WINDOW_BYTES // (len(next_one) + 1)))
        found: list[bytes] = client.lrange(key, -read - window, -read - 1)  # type: ignore[assignment]
        found.reverse()
        strays = self._strays(key, found, default)
        far = read + len(found) > MOST_MOVED or read_bytes + sum(map(len, found)) > MOST_MOVED_BYTES
        if far and len(strays) > FAR_PASS:
            found = found[: strays[FAR_PASS].place]
            strays = strays[:FAR_PASS]
        stay_bytes = sum(map(len, found)) - sum(len(stray.payload) for stray in strays)
        self._read[key] = read + len(found) - len(strays), read_bytes + stay_bytes
        passed = self.route(key, read, strays, at_once=FAR_CALL if far else WINDOW)
        for stray in strays if passed else ():
            if stray.final is not None:
                task_id, tier = stray.final.task_id, keys.place_of(key).tier
                log.info("task_refused", task_id=task_id, queue=tier, reason=_unknown(stray.model))
        return passed

    def route(self, list_key: str, read: int, strays: Sequence[Stray], *, at_once: int = WINDOW) -> int:
        """Pass on, or end, tasks that wait in a list but are for another model; return how many.

        ``read``: the number of tasks served before those that were read with the strays; ``at_once``: maximum
        strays per call.
        """
        passed = 0
        for first in range(0, len(strays), at_once):
            args: list[Argument] = [self._result_ttl_s, read]
            for place, payload, model, final in strays[first : first + at_once]:
                args += (place - passed, payload, model)
                args += final.fields if final else ("", "", "", "", "")
            passed += int(self._route(keys=[list_key], args=args))
        return passed

    def _strays(self, key: str, found: list[bytes], default: str) -> list[Stray]:
        """Return the tasks for other models; those for unknown models with their end.

        A task for an unknown model is left out if something follows it: the worker that claims it sends that.
        """
        named = [(place, payload, *self._named(payload)) for place, payload in enumerate(found)]
        strays = [
            (place, payload, envelope, model)
            for place, payload, envelope, model in named
            if envelope and model and model != default
        ]
        models = dict.fromkeys(model for *_, model in strays)
        unknown = catalogue.unknown(self._store.client, models) if models else ()
        return [
            Stray(place, payload, model, self._end(key, envelope, model) if model in unknown else None)
            for place, payload, envelope, model in strays
            if model not in unknown or not envelope.embed
        ]

    def _named(self, payload: bytes) -> tuple[Envelope | None, str]:
        """Return a message of ours and its model; (None, '') if it names none, or may not be read here."""
        if len(payload) > UNPACKED_BYTES:
            return None, ""
        try:
            envelope = peek(payload)
            if envelope is None or envelope.deaths or envelope.task not in self._names:
                return None, ""
            args, kwargs, _ = envelope.body(UNPACKED_BYTES)
        except (Undecodable, PayloadTooLarge):  # the worker that claims it reports the error
            return None, ""
        model = kwargs.get("model") or (args[1] if len(args) > 1 else None)
        if not isinstance(model, str) or not MODEL_NAME.fullmatch(model):
            return None, ""
        return envelope, model

    def _end(self, key: str, envelope: Envelope, model: str) -> Final:
        error, caller = UnknownModel(_unknown(model), "model"), keys.place_of(key).caller
        return Final(
            None,
            envelope.id,
            results.failure(envelope.id, error, worker=self._store.worker, caller=caller),
            keep=not envelope.headers.get("ignore_result"),
            reply=envelope.reply_to,
            label=label("failed", keys.place_of(key).tier, model),
        )


def _unknown(model: str) -> str:
    return f"the fleet knows no model {model!r}"
