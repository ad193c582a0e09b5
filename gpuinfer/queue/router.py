# SPDX-License-Identifier: Apache-2.0
"""Passes on what plain Celery producers put into the default model's lists for another model.

A worker of the default model does that when it claims such a task. While none lives, any worker of the tier
looks through those lists and passes on what is for others; the default model's own tasks wait.
"""

from __future__ import annotations

from gpuinfer.errors import PayloadTooLarge
from gpuinfer.models.manifest import MODEL_NAME
from gpuinfer.queue import heartbeats, keys
from gpuinfer.queue.message import Undecodable, peek
from gpuinfer.queue.store import Store

#: Tasks of one list that one look reads, and about how many bytes: a long backlog is read in parts.
WINDOW, WINDOW_BYTES = 500, 8 * 1024 * 1024
#: What unpacks to more is read by the worker that claims it, and is charged with what it does there.
UNPACKED_BYTES = 1024 * 1024


class Router:
    """Looks through the default model's lists, a part at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: List -> how many of its tasks, from the next to be served, were read already.
        self._read: dict[str, int] = {}

    def pass_on(self) -> int:
        """Pass on what one look finds; return how many tasks. Raises redis-py's errors."""
        client, store = self._store.client, self._store
        named: bytes | None = client.get(keys.DEFAULT_MODEL)  # type: ignore[assignment]  # not decoded
        default = (named or b"").decode()
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
                passed += self._look_through(key, size, default) if size else 0
        return passed

    def _sizes(self, lists: list[str]) -> list[int]:
        with self._store.client.pipeline(transaction=False) as pipe:
            for key in lists:
                pipe.llen(key)
            return [int(size) for size in pipe.execute()]

    def _look_through(self, key: str, size: int, default: str) -> int:
        done = self._read.get(key, 0)
        done = done if done < size else 0
        client = self._store.client
        next_one: bytes = client.lindex(key, -done - 1) or b""  # type: ignore[assignment]  # not decoded
        window = max(1, min(WINDOW, WINDOW_BYTES // (len(next_one) + 1)))
        found: list[bytes] = client.lrange(key, -done - window, -done - 1)  # type: ignore[assignment]
        tasks = [(payload, model) for payload in reversed(found) if (model := _model_of(payload, default))]
        self._read[key] = done + len(found) - len(tasks)
        return self._store.route(key, tasks)


def _model_of(payload: bytes, default: str) -> str | None:
    """Return the model that a message names, None for the default one or what cannot be told."""
    try:
        found = peek(payload)
        if found is None:
            return None
        args, kwargs, _ = found.body(UNPACKED_BYTES)
    except (Undecodable, PayloadTooLarge):  # the worker that claims it says what is wrong
        return None
    model = kwargs.get("model") or (args[1] if len(args) > 1 else None)
    named = isinstance(model, str) and MODEL_NAME.fullmatch(model) is not None
    return model if named and model != default else None
