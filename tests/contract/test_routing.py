# SPDX-License-Identifier: Apache-2.0
"""Tasks reach the workers of their model: by our clients at once, from plain producers by being passed on."""

from __future__ import annotations

from typing import Any

import pytest

from gpuinfer import Client
from gpuinfer.errors import InputError, UnknownModel
from gpuinfer.queue import catalogue, keys, router
from gpuinfer.queue.claims import Stray
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.depth import read as read_depth
from gpuinfer.queue.message import decode
from gpuinfer.queue.router import Router
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, QueueSettings
from tests.contract.conftest import commands, ids, message, on, send, store_of
from tests.unit.test_keys import STRANGE

pytestmark = [pytest.mark.integration, on("redis-socket", "valkey-tls")]

URGENT = keys.list_key("realtime", 9)


@pytest.fixture
def other(store: Store, broker: BrokerSettings) -> Store:
    """A worker that serves another model than the default one."""
    return store_of(broker, "gpu1@here", ("ocr",))


def plain(store: Store, key: str, model: str | None) -> str:
    """Append a task as a plain producer does; return its id."""
    payload = message(model)
    store.client.lpush(key, payload)
    return decode(payload).id


def forget_workers(store: Store) -> None:
    """Let so much time pass that no worker counts as alive."""
    raw: Any = store.client
    for name in raw.keys(keys.GROUPS_PREFIX + "*"):
        raw.zadd(name, dict.fromkeys(raw.zrange(name, 0, -1), 1))


def test_the_default_models_lists_have_no_name(store: Store, other: Store, client: Client) -> None:
    """Also when a client names it; another model's have its name."""
    for model in (None, "digits", "ocr"):
        client.submit([1], model=model, priority=9)
    assert store.client.llen(URGENT) == 2
    assert store.client.llen(keys.list_key("realtime.ocr", 9)) == 1


def test_a_message_names_its_model(store: Store, client: Client) -> None:
    """Also when the caller does not: should the default change while it waits, it is for the one it was."""
    client.submit([1])
    (task,) = store.claim(1)
    assert decode(task.payload).body()[1]["model"] == "digits"


def test_a_worker_claims_its_own_models_alone(store: Store, other: Store, client: Client) -> None:
    """However urgent another one's tasks are."""
    urgent = client.submit([1], model="ocr", priority=9)
    low = client.submit([1], queue="batch")
    assert ids(store.claim(10)) == [low]
    assert store.claim(10) == []
    assert ids(other.claim(10)) == [urgent]


def test_another_default_model(store: Store, other: Store, client: Client) -> None:
    """What waits under no name is the new one's; what waits under its name is served, too."""
    old = client.submit([1], model="ocr")
    bare = plain(store, "realtime", None)
    store.client.set(keys.DEFAULT_MODEL, "ocr")
    new = client.submit([1], model="ocr")
    assert store.client.llen("realtime") == 2
    assert store.claim(10) == []
    assert sorted(ids(other.claim(10))) == sorted([old, bare, new])
    assert client.submit([1], model="digits")
    assert store.client.llen("realtime.digits") == 1


def test_a_worker_passes_on_what_it_claims(store: Store, other: Store, client: Client) -> None:
    """A plain producer's tasks for another model keep their order, claim for claim; no delivery counts."""
    first = client.submit([1], model="ocr", priority=9)
    tasks = [plain(store, URGENT, "digits" if number % 3 == 2 else "ocr") for number in range(12)]
    own = []
    for _ in range(2):
        claimed = store.claim(6, search=True)
        strange = {task.seq: "ocr" for task in claimed if decode(task.payload).body()[1]["model"] == "ocr"}
        assert store.release(strange, models=strange) == 4
        own += [task for task in claimed if task.seq not in strange]
    assert ids(own) == tasks[2::3]
    held = {int(field) for field in store.client.hkeys(store.inflight) if field.isdigit()}
    assert held == {task.seq for task in own}
    found = other.claim(100)
    assert ids(found) == [first, *(task for number, task in enumerate(tasks) if number % 3 != 2)]
    assert {task.list_key for task in found} == {keys.list_key("realtime.ocr", 9)}
    assert {decode(task.payload).deliveries for task in found} == {0}
    raw: Any = store.client
    counts = {key.decode(): int(count) for key, count in raw.hgetall(keys.CLAIMED).items()}
    assert counts == {f"{URGENT} digits": 4, keys.list_key("realtime.ocr", 9): 9}


def test_a_worker_of_another_model_routes(store: Store, other: Store) -> None:
    """While none of the default model lives: each list's tasks in their order; the default's own stay."""
    sent: dict[str, list[str]] = {}
    for key in ("realtime", URGENT, "batch"):
        sent[key] = [plain(store, key, model) for model in ("ocr", None, "ocr", "digits", "ocr")]
    forget_workers(store)
    other.register()
    assert Router(other, QueueSettings()).pass_on() == 9
    wanted = [sent[key][place] for key in (URGENT, "realtime", "batch") for place in (0, 2, 4)]
    assert ids(other.claim(100)) == wanted
    own = [sent[key][place] for key in (URGENT, "realtime", "batch") for place in (1, 3)]
    assert ids(store.claim(100, search=True)) == own


def test_nobody_routes_past_a_living_worker(store: Store, other: Store) -> None:
    """It claims such a task, and passes it on by itself; nor is a tier looked at that nobody here serves."""
    plain(store, "realtime", "ocr")
    assert Router(other, QueueSettings()).pass_on() == 0
    assert Router(store, QueueSettings()).pass_on() == 0
    forget_workers(store)
    other.serve(["batch"])
    assert Router(other, QueueSettings()).pass_on() == 0
    assert store.client.llen("realtime") == 1


def test_a_long_backlog_is_looked_through_in_parts(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind tasks of the default model, too; and what comes later is found again and again."""
    monkeypatch.setattr(router, "WINDOW", 7)
    forget_workers(store)
    looks, own = Router(other, QueueSettings()), 0
    for _ in range(3):
        sent = [plain(store, "realtime", "ocr" if number % 5 == 0 else None) for number in range(30)]
        own += 24
        passed = [looks.pass_on() for _ in range(2 * (own + 6) // 7 + 1)]
        assert max(passed) <= 7
        assert sum(passed) == 6
        assert ids(other.claim(100)) == sent[::5]
        assert store.client.llen("realtime") == own


@pytest.mark.parametrize("far", [False, True], ids=["popped and pushed", "each by itself"])
def test_many_are_passed_on_in_their_order(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch, *, far: bool
) -> None:
    """However they are taken out of the list; what is between them and before them keeps its place."""
    if far:
        monkeypatch.setattr(router, "MOST_MOVED_BYTES", 1000)
    sent = [plain(store, "realtime", "ocr" if number % 3 == 2 else None) for number in range(60)]
    twice = message("ocr")
    store.client.lpush("realtime", twice, twice)
    forget_workers(store)
    looks = Router(other, QueueSettings())
    store.client.config_resetstat()
    assert looks.pass_on() == 22
    assert commands(store, "lrem") == (22 if far else 0)
    assert ids(other.claim(100)) == [*sent[2::3], *[decode(twice).id] * 2]
    assert ids(store.claim(100, search=True)) == [one for number, one in enumerate(sent) if number % 3 != 2]


def test_a_look_costs_redis_little(store: Store, other: Store) -> None:
    """However much is before what it passes on: 20,000 tasks, and it looks no further."""
    own = message()
    for _ in range(20):
        store.client.lpush("realtime", *[own] * 999)
    sent = [plain(store, "realtime", "ocr") for _ in range(100)]
    forget_workers(store)
    looks = Router(other, QueueSettings())
    looks._read["realtime"] = router.MOST_READ - 100, 0
    commands(store)
    assert [looks.pass_on() for _ in range(4)] == [30, 30, 30, 10]
    info: Any = store.client.info("commandstats")
    assert info["cmdstat_lrem"]["calls"] == 100
    assert info["cmdstat_evalsha"]["calls"] >= 100 / 3  # 3 searches of 2 to 3 ms by themselves in each
    assert ids(other.claim(100)) == sent
    store.client.lpush("realtime", *[own] * 20)
    plain(store, "realtime", "ocr")
    looks._read["realtime"] = 20_000, 0
    assert looks.pass_on() == 0
    assert store.client.llen("realtime") == 20_001


def test_what_has_lost_its_place_waits(store: Store, other: Store) -> None:
    """Somebody has put a task back since the list was read: nothing is passed on twice, or lost."""
    sent = [plain(store, "realtime", "ocr") for _ in range(3)]
    forget_workers(store)
    raw: Any = store.client
    read = [Stray(n, payload, "ocr") for n, payload in enumerate(raw.lrange("realtime", 0, -1)[::-1])]
    back = message()
    store.client.rpush("realtime", back)
    assert Router(other, QueueSettings()).route("realtime", 0, read) == 0
    assert Router(other, QueueSettings()).route("realtime", 1, [read[0], read[2]]) == 2
    assert ids(other.claim(10)) == [sent[0], sent[2]]
    assert store.client.lrange("realtime", 0, -1) == [read[1].payload, back]
    assert Router(other, QueueSettings()).route("realtime", 5, read) == 0


def test_a_router_ends_what_nobody_knows(store: Store, other: Store, client: Client) -> None:
    """As a worker of the default model does when it claims it; the caller is told, and no list is made."""
    lost = plain(store, "realtime", "nosuch")
    found, own = plain(store, "realtime", "ocr"), plain(store, "realtime", None)
    forget_workers(store)
    assert Router(other, QueueSettings()).pass_on() == 2
    with pytest.raises(UnknownModel, match="knows no model 'nosuch'"):
        client.result(lost, timeout_s=60)
    assert store.client.hget(keys.ENDED, "failed realtime nosuch") == b"1"
    assert ids(other.claim(10)) == [found]
    assert ids(store.claim(10, search=True)) == [own]
    assert not store.client.exists(keys.index("nosuch"), "realtime.nosuch")


def test_a_router_reads_nothing_that_may_end_it(store: Store, other: Store) -> None:
    """No death could be charged to what was not claimed: what died once, what is large, another's task."""
    died = message("ocr").replace(b"{", b'{"gpuinfer": [1, 1], ', 1)
    large = message("ocr").replace(b"[[1]", b"[[" + b"1," * router.UNPACKED_BYTES + b"1]")
    strange = message("ocr").replace(b"gpuinfer.predict", b"somebody.elses")
    for payload in (died, large, strange):
        store.client.lpush("realtime", payload)
    forget_workers(store)
    looks = Router(other, QueueSettings())
    assert [looks.pass_on() for _ in range(3)] == [0, 0, 0]
    assert store.client.llen("realtime") == 3


def test_a_model_without_work_leaves_no_trace(broker: BrokerSettings, store: Store, client: Client) -> None:
    """However many names come and go."""
    for number in range(3):
        store.client.delete(keys.CATALOGUE)
        client.submit([1], model=f"m{number}")
        worker = store_of(broker, f"gpu{number}@m", (f"m{number}",))
        assert len(worker.claim(5)) == 1
    store.register()
    assert not store.client.smembers(keys.INDEXED)


def test_large_payloads_are_read_in_small_parts(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the size of the next one: a look does not read hundreds of megabytes."""
    sent = [plain(store, "realtime", "ocr") for _ in range(10)]
    # Their lengths differ by a few bytes, as a time of "…809.9" is shorter than one of "…809.924".
    monkeypatch.setattr(router, "WINDOW_BYTES", 4 * (len(message("ocr")) + 20))
    forget_workers(store)
    looks = Router(other, QueueSettings())
    assert [looks.pass_on() for _ in range(4)] == [4, 4, 2, 0]
    monkeypatch.setattr(router, "WINDOW_BYTES", 1)
    sent += [plain(store, "realtime", "ocr") for _ in range(2)]
    assert [looks.pass_on() for _ in range(3)] == [1, 1, 0]
    assert ids(other.claim(100)) == sent


def test_what_names_no_model_is_not_passed_on(store: Store, other: Store) -> None:
    """Garbage waits for a worker of the default model, which says what is wrong with it."""
    for payload in (b"\xff", b"{}", message("no model/at all")):
        store.client.lpush("realtime", payload)
    forget_workers(store)
    assert Router(other, QueueSettings()).pass_on() == 0
    assert store.client.llen("realtime") == 3


@pytest.mark.parametrize("name", ["", "x\x06\x16zz", "a@b", "A", "a b", "x" * 65, 7])
def test_a_name_that_no_model_can_have(store: Store, client: Client, name: Any) -> None:
    """It is refused also while the catalogue is empty: it would be read as another list's coordinates."""
    store.client.delete(keys.CATALOGUE)
    for submit in (client.submit, client.submit_batch, client.submit_many):
        with pytest.raises(InputError, match="model: must be a model's name"):
            submit([[1]], model=name)


@pytest.mark.parametrize("key", STRANGE)
def test_a_strange_list_is_not_indexed(store: Store, key: str) -> None:
    """And one that is counts for nothing, and is told of; the lists that are ours are counted."""
    bind(store.client, "put")(keys=[key], args=[b"x"])
    assert not store.client.exists(keys.INDEXED)
    raw: Any = store.client
    raw.zadd(keys.index("digits"), {key: 3})
    raw.hset(keys.CLAIMED, key, 3)
    send(store, 2)
    depth = read_depth(raw)
    assert (depth.lanes, depth.foreign) == ({Lane("realtime", "digits"): {0: 2}}, {key: "list"})


@pytest.mark.parametrize("known", [False, True])
def test_a_model_that_nobody_knows(broker: BrokerSettings, client: Client, *, known: bool) -> None:
    """It is refused with the names there are, and nothing is written; a fleet that never was accepts all."""
    if not known:
        assert client.submit([1], model="nobody")
        return
    store = store_of(broker, models=("digits", "ocr"))
    before = store.client.keys()
    for submit in (client.submit, client.submit_batch, client.submit_many):
        with pytest.raises(UnknownModel, match="the fleet knows no model 'nobody'; known: digits, ocr"):
            submit([[1]], model="nobody")
    with pytest.raises(UnknownModel):
        client.submit([1], model="nobody", idempotency_key="k")
    # That this client makes ids is written once, whatever becomes of its tasks.
    assert set(store.client.keys()) - {keys.ORIGINS.encode()} == set(before)
    assert catalogue.unknown(store.client, ["digits", "nobody"]) == ("nobody",)


def test_a_default_model_that_nobody_knows(store: Store, client: Client) -> None:
    """A caller who names no model is told which one it is that is not known, and what sets another."""
    store.client.set(keys.DEFAULT_MODEL, "gone")
    with pytest.raises(UnknownModel, match="default model 'gone'; known: digits; gpuinfer model default"):
        client.submit([1])
