# SPDX-License-Identifier: Apache-2.0
"""The contract of a purge: all that waits in a queue ends as revoked, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import redis

from gpuinfer import Client
from gpuinfer.errors import UsageError
from gpuinfer.queue import bodies, keys, purge
from gpuinfer.queue.purge import check, lines
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import QueueSettings
from tests.contract.conftest import calls, ids, message, on, send

pytestmark = [pytest.mark.integration, on("redis-socket")]


def empty(store: Store, queue: str | None = None) -> int:
    return purge.purge(store.client, lines(store.client, queue), QueueSettings())


def test_all_that_waits_is_revoked(store: Store, client: Client) -> None:
    """Of all callers and priorities, and a plain producer's; what is claimed, and another tier's, goes on."""
    held = send(store)
    claimed = store.claim(1)
    wanted = [*send(store, 3), *send(store, 2, caller="alice"), client.submit([1], priority=9)]
    other = send(store, 2, queue="batch")
    store.client.lpush("realtime", message(), b"not json")
    assert empty(store, "realtime") == len(wanted) + 2
    assert {client.status(task_id).state for task_id in wanted} == {"revoked"}
    assert {client.status(task_id).state for task_id in (*held, *other)} == {"queued"}
    assert ids(claimed) == held
    assert ids(store.claim(9)) == other


def test_those_with_an_eta_are_revoked(store: Store, client: Client) -> None:
    """They wait in a set of their own; nothing is left of it for long."""
    wanted = send(store, 2)
    store.postpone([(task.seq, time.time() + 3600) for task in store.claim(2)])
    assert empty(store, "batch") == 0
    assert empty(store) == 2
    assert {client.status(task_id).state for task_id in wanted} == {"revoked"}
    assert not store.client.exists(keys.later("realtime"))


def test_one_model_of_a_tier(store: Store, client: Client) -> None:
    """``tier.model`` names the default model's, too, whose lists have no name in theirs."""
    store.register(default="digits")
    store.client.zadd(keys.CATALOGUE, {"ocr": 1})
    ours, theirs = client.submit([1]), client.submit([1], model="ocr")
    assert empty(store, "realtime.ocr") == 1
    assert [client.status(task_id).state for task_id in (ours, theirs)] == ["queued", "revoked"]
    assert empty(store, "realtime.digits") == 1


def test_nothing_is_unpacked(store: Store, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Celery's first protocol the id stands in the body, perhaps a bomb; the correlation id will do."""
    monkeypatch.setattr(bodies, "_unpack", lambda *_: pytest.fail("unpacked"))
    bomb = {
        "body": "",
        "headers": {"compression": "application/x-gzip"},
        "properties": {"correlation_id": "bomb", "body_encoding": "base64"},
        "content-type": "application/json",
    }
    store.client.lpush("realtime", json.dumps(bomb))
    assert empty(store, "realtime") == 1
    assert client.status("bomb").state == "revoked"


def test_what_is_no_queue(store: Store) -> None:
    """Refused before anything is looked up."""
    for queue in ("", "realtimes", "realtime.", "celery", "realtime@me"):
        with pytest.raises(UsageError, match="realtime, default, batch"):
            check(queue)


def test_who_waits_is_told(store: Store, client: Client) -> None:
    """A client that waits hears of the end at once, and it is counted."""
    task_id = client.submit([1])
    found: list[str] = []
    waiter = threading.Thread(
        target=lambda: found.extend(status.state for status in client.as_completed([task_id], 60))
    )
    waiter.start()
    raw: Any = store.client
    until = time.monotonic() + 60
    while not raw.pubsub_channels() and time.monotonic() < until:
        time.sleep(0.01)
    empty(store)
    waiter.join(60)
    assert found == ["revoked"]
    assert raw.hgetall(keys.ENDED)[b"cancelled realtime digits"] == b"1"


def test_a_full_redis(store: Store, client: Client) -> None:
    """It is then that a purge is wanted."""
    wanted = client.submit_many([[1]] * 300)
    store.client.config_set("maxmemory", 1)
    assert empty(store) == 300
    store.client.config_set("maxmemory", 0)
    assert client.status(wanted[0]).state == "revoked"


def test_cut_off_between_two_calls(store: Store, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task waits, or is revoked; the next purge goes on."""
    monkeypatch.setattr(purge, "CALL_TASKS", 3)
    wanted = client.submit_many([[1]] * 8)
    calls = [0]

    def cut(client: redis.Redis, name: Any) -> Any:
        script = bind(client, name)

        def call(**given: Any) -> Any:
            calls[0] += name == "purge"
            if calls[0] == 3:
                raise redis.ConnectionError("killed")
            return script(**given)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(purge, "bind", cut)
        with pytest.raises(redis.ConnectionError):
            empty(store)
    states = [client.status(task_id).state for task_id in wanted]
    assert states == ["revoked"] * 4 + ["queued"] * 4
    assert store.client.llen("realtime") == 4
    assert empty(store) == 4


def test_what_a_worker_takes_meanwhile_is_its_own(
    store: Store, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed between the look and the end of it, a task is not revoked, and no neighbour escapes."""
    wanted = client.submit_many([[1]] * 5)
    (line,) = lines(store.client, "realtime")
    payloads = purge._head(store.client, line, 5)
    monkeypatch.setattr(purge, "_head", lambda *_: payloads)
    claimed = store.claim(2)
    assert purge.purge(store.client, [line], QueueSettings()) == 3
    assert ids(claimed) == wanted[:2]
    states = [client.status(task_id).state for task_id in wanted]
    assert states == ["queued"] * 2 + ["revoked"] * 3


def test_what_would_have_followed_ends_too(store: Store, client: Client) -> None:
    """The successor of a purged task never begins, and says so."""
    text = message().decode()
    chained = text.replace(
        '\\"chain\\":null', '\\"chain\\":[{\\"task\\":\\"a.b\\",\\"options\\":{\\"task_id\\":\\"next\\"}}]'
    )
    assert chained != text
    store.client.lpush("realtime", chained)
    assert empty(store) == 1
    assert client.status("next").state == "revoked"
    assert not store.client.exists("realtime")


def test_no_call_takes_much(store: Store, client: Client) -> None:
    """A purge of many, and of large ones: no call takes more than its part."""
    client.submit_many([[1]] * 3000)
    client.submit_many(["x" * 60_000] * 100, queue="batch")
    large = purge.CALL_BYTES // 60_000 + 1  # as many of them as fit into a call
    least = 3000 // purge.CALL_TASKS + 100 // large
    assert calls(store, lambda: empty(store)) >= least
    assert not store.client.exists("realtime", "batch")
