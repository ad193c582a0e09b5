# SPDX-License-Identifier: Apache-2.0
"""The watcher one step at a time, on a real Redis: who serves what waits, and how that is explained."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from gpuinfer import Client
from gpuinfer.api.schemas import DIGIT
from gpuinfer.client.signatures import versions
from gpuinfer.models.signature import Signature
from gpuinfer.queue import keys
from gpuinfer.queue.connection import connect
from gpuinfer.queue.depth import Lane
from gpuinfer.queue.fleet import HOSTS
from gpuinfer.settings import Settings
from gpuinfer.watcher import notes
from gpuinfer.watcher.main import Watcher
from gpuinfer.watcher.notes import DECISIONS
from gpuinfer.watcher.units import UnitView
from tests.services import RedisServer
from tests.told import Build, Told, cpu

pytestmark = pytest.mark.integration


def one_each(number: int) -> dict[str, str]:
    """Return the environments of two instances: realtime for digits, and everything for ocr."""
    special = [{"GPUINFER_WORKER_QUEUES": "realtime"}, {"GPUINFER_WORKER_MODELS": "ocr"}]
    return special[number]


async def test_models_that_could_not_be_made_known(redis_server: RedisServer, settings_for: Build) -> None:
    """They are at the next look, and why not is said once."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.set(keys.CATALOGUE, "no set")
    watcher = Watcher(settings, Told(1), (0,), act=True, host="a")
    models = [watcher._instance(0, UnitView(), 0.0)]
    with capture_logs() as logs:
        for _ in range(2):
            watcher._announcer.step(models)
        client.delete(keys.CATALOGUE)
        await watcher.step()
    assert client.zrange(keys.CATALOGUE, 0, -1) == [b"digits"]
    assert [entry["event"] for entry in logs].count("models_not_made_known") == 1


async def test_a_backlog_starts_who_serves_it(redis_server: RedisServer, settings_for: Build) -> None:
    """By each instance's own settings; a model that nothing runs for is known, and starts its worker."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.zadd(keys.CATALOGUE, {"digits": 1e10, "ocr": 1e10})
    client.set(keys.DEFAULT_MODEL, "digits")
    units = Told(2)
    watcher = Watcher(settings, units, (0, 1), act=True, host="a", environment=one_each)
    with Client(settings) as submitter:
        submitter.submit(DIGIT, model="digits", queue="batch")
        await watcher.step()
        assert units.done == []
        submitter.submit([1.0], model="ocr", queue="batch")
    await watcher.step()
    assert units.done == [("start", 1)]
    told = orjson.loads(client.hget(HOSTS, "a") or b"")["instances"]
    assert [(one["tiers"], one["models"]) for one in told] == [
        (["realtime"], ["digits"]),
        (["realtime", "default", "batch"], ["ocr"]),
    ]


async def test_what_no_worker_serves_is_known_with_a_remedy(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """The alert ``no-worker`` is made from it; it ends with the tasks."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.zadd(keys.CATALOGUE, {"digits": 1e10})
    client.set(keys.DEFAULT_MODEL, "digits")
    watcher = Watcher(settings, Told(2), (0, 1), act=True, host="a", environment=one_each)
    found = []
    with Client(settings) as submitter:
        for _ in range(2):
            submitter.submit(DIGIT, model="digits", queue="batch")
            found.append(await watcher.step())
        client.delete("batch")
        found.append(await watcher.step())
    first, second, last = [decision.stranded for decision in found if decision is not None]
    assert first is not None
    assert second is not None
    lane = Lane("batch", "digits")
    assert [one[lane].waiting for one in (first, second)] == [1, 2]
    assert "GPUINFER_WORKER_QUEUES=realtime,batch" in first[lane].remedy
    assert last == {}


async def test_models_that_could_be_served_are_made_known(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """Those that are installed, of instances that may run; also when Redis is full."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.lpush("realtime", *[b"x" * 1000] * 3000)
    client.config_set("maxmemory", "2mb")
    models = [{"GPUINFER_WORKER_MODELS": name} for name in ("digits,nowhere", "digits-photo", "digits")]
    units = Told(3)
    units.views[1] = UnitView(masked=True)
    watcher = Watcher(settings, units, (0, 1, 2), act=True, host="a", environment=lambda n: models[n])
    await watcher.step()
    assert client.zrange(keys.CATALOGUE, 0, -1) == [b"digits"]
    seen: Any = client.zscore(keys.CATALOGUE, "digits")
    assert abs(client.time()[0] - seen) < 60
    said: Any = client.hgetall(keys.SIGNATURES)
    assert list(said) == [b"digits"]
    (text,) = versions(said[b"digits"])
    assert Signature.from_json(orjson.loads(text)).inputs[0].shape == (1, 8, 8)


async def test_a_file_of_an_instance_that_cannot_be_read_is_said_once(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """It is taken to serve what all serve, until it can be read."""
    settings = cpu(redis_server, settings_for)
    texts = [{"GPUINFER_WORKER_QUEUES": "sometimes"}]
    watcher = Watcher(settings, Told(1), (0,), act=True, host="a", environment=lambda _: texts[-1])
    with capture_logs() as logs:
        for _ in range(3):
            await watcher.step()
    assert len([entry for entry in logs if entry["event"] == "instance_settings_unreadable"]) == 1
    assert told_tiers(settings) == ["realtime", "default", "batch"]
    texts.append({"GPUINFER_WORKER_QUEUES": "batch"})
    await watcher.step()
    assert told_tiers(settings) == ["batch"]


def told_tiers(settings: Settings) -> object:
    """Return the queues of the only instance, as its watcher tells the others."""
    return orjson.loads(connect(settings.broker).hget(HOSTS, "a") or b"")["instances"][0]["tiers"]


async def test_the_explanation_has_a_line_for_each_part_of_the_fleet(
    redis_server: RedisServer, settings_for: Build
) -> None:
    """What waits for whom, how many run, and what is wanted."""
    settings = cpu(redis_server, settings_for)
    client = connect(settings.broker)
    client.set(keys.DEFAULT_MODEL, "ocr")
    watcher = Watcher(settings, Told(2), (0, 1), act=True, host="a", environment=one_each)
    client.lpush("batch", "x")
    await watcher.step()
    told = notes.told(orjson.loads(client.lrange(DECISIONS, 0, 0)[0]), "now").splitlines()
    assert told[0].startswith(
        "now  a  scale_up: realtime,default,batch:ocr: 1 worker is desired, none runs: "
    )
    assert told[2:] == [
        "    realtime,default,batch:ocr: 1 waiting, 0 of 1 run, 1 desired, 1/s a worker",
        "    realtime:digits: 0 waiting, 0 of 1 run, 0 desired, 1/s a worker",
        "    start gpu1@a: 1 desired, 0 run",
    ]


async def test_why_nothing_is_started_is_explained(redis_server: RedisServer, settings_for: Build) -> None:
    """Tasks wait, and no instance may be started: that is a decision, too, and it is told once."""
    settings = cpu(redis_server, settings_for)
    units = Told(2)
    units.views = {0: UnitView(state="failed"), 1: UnitView(masked=True)}
    watcher = Watcher(settings, units, (0, 1), act=True, host="a")
    with Client(settings) as client:
        for _ in range(30):
            client.submit(DIGIT)
    for _ in range(3):
        await watcher.step()
    kept = [orjson.loads(text) for text in connect(settings.broker).lrange(DECISIONS, 0, -1)]
    assert [(entry["verdict"], entry["actions"]) for entry in kept] == [("hold", [])]
    units.views[1] = UnitView()
    await watcher.step()
    await watcher.step()  # each probe tells what the one before it has decided
    hosts: dict[bytes, bytes] = connect(settings.broker).hgetall(HOSTS)  # type: ignore[assignment]
    (now,) = notes.present(hosts, orjson.loads(hosts[b"a"])["at"]).values()
    assert now["alive"]
    assert "masked" not in now["why"]
    assert "gpu0@a (in quarantine" in now["why"]
    told = notes.told(kept[0], "now")
    assert "no other instance can be started" in told
    assert (
        "gpu0@a (in quarantine for 30 s more: its unit failed), gpu1@a (masked, until it is unmasked)" in told
    )
