# SPDX-License-Identifier: Apache-2.0
"""doctor's check of whether somebody serves what waits, on a real Redis."""

from __future__ import annotations

import socket
from pathlib import Path

import orjson
import pytest

from gpuinfer.doctor import fleet
from gpuinfer.doctor.host import Finding, Host
from gpuinfer.queue import keys
from gpuinfer.queue.drained import set_drained
from gpuinfer.queue.fleet import HOSTS
from gpuinfer.queue.purge import set_paused
from gpuinfer.queue.store import Store
from gpuinfer.settings import Loaded, Settings
from tests.apis import HandWorker
from tests.services import RedisServer

pytestmark = pytest.mark.integration


def test_what_waits_for_nobody_is_an_error(redis_server: RedisServer, tmp_path: Path) -> None:
    """Served neither here nor elsewhere; a worker elsewhere, or a file of one here, fixes it."""
    settings = Settings.model_validate({"broker": {"url": redis_server.url}})
    here = Host(Loaded(settings, {}), root=tmp_path)
    assert fleet.waiting(here) == Finding("ok", "workers serve all that waits: 0 tasks in 0 queues")
    with redis_server.client() as client:
        client.set(keys.DEFAULT_MODEL, "digits")
        client.zadd(keys.CATALOGUE, {"digits": 1e10, "ocr": 1e10})
        client.lpush("realtime", "x")
        client.lpush("batch.ocr", "x", "y")
        found = fleet.waiting(here)
        assert isinstance(found, list)
        assert [(one.status, one.message) for one in found] == [
            ("error", "2 tasks wait in batch for ocr, which no worker serves")
        ]
        assert "GPUINFER_WORKER_MODELS=digits,ocr >> /etc/gpuinfer/worker@0.env" in found[0].remedy
        store = Store(client, "gpu0@elsewhere", ("batch",), settings.queue, models=["ocr"])
        store.register(b'{"queues": ["batch"], "models": ["ocr"]}')
        sound = Finding("ok", "workers serve all that waits: 3 tasks in 2 queues")
        assert fleet.waiting(here) == sound
        client.delete(keys.heartbeat("gpu0@elsewhere"))
    assert isinstance(fleet.waiting(here), list)
    (tmp_path / "etc/gpuinfer").mkdir(parents=True)
    (tmp_path / "etc/gpuinfer/worker@0.env").write_text("GPUINFER_WORKER_MODELS=ocr\n")
    assert fleet.waiting(here) == sound


def test_what_is_paused_and_what_is_foreign(redis_server: RedisServer, tmp_path: Path) -> None:
    """Each is named, with the command that undoes it."""
    here = Host(Loaded(Settings.model_validate({"broker": {"url": redis_server.url}}), {}), root=tmp_path)
    assert fleet.paused(here) == Finding("ok", "no queue is paused, no worker drained")
    assert fleet.foreign(here) == Finding("ok", "no other program's key has the name of a queue")
    with redis_server.client() as client:
        client.lpush("batch", "x")
        client.set("realtime\x06\x169", "a stranger's")
        set_paused(client, "batch", paused=True)
    assert fleet.paused(here) == [
        Finding(
            "warning",
            "batch is paused: 1 task waits there",
            "gpuinfer queue resume batch",
        )
    ]
    (found,) = fleet.foreign(here)  # type: ignore[misc]  # a list
    assert "is a string" in found.message
    assert found.remedy.endswith(r"DEL $'realtime\x06\x169'")


def test_a_model_that_a_worker_lacks(redis_server: RedisServer, tmp_path: Path) -> None:
    """Of one that is not installed nothing can be shown: it is added, or the settings name another."""
    here = Host(Loaded(Settings.model_validate({"broker": {"url": redis_server.url}}), {}), root=tmp_path)
    missing = {"absent": "there is no model 'absent'; known: digits", "broken": "model.pt is not loaded"}
    with redis_server.client() as client:
        worker = HandWorker(client, name="gpu2@far")
        worker.beat(missing=missing)
    found = fleet.workers(here)
    assert isinstance(found, list)
    restart = "on far: systemctl restart gpuinfer-worker@2"
    assert found == [
        Finding("ok", "1 worker runs: gpu2@far"),
        Finding(
            "warning",
            f"gpu2@far serves without absent: {missing['absent']}",
            f"gpuinfer model add FOLDER --name absent  # or change worker.models; then, {restart}",
        ),
        Finding(
            "warning",
            "gpu2@far serves without broken: model.pt is not loaded",
            f"gpuinfer model show broken  # then, {restart}",
        ),
    ]


def test_a_worker_in_quarantine_is_named(redis_server: RedisServer, tmp_path: Path) -> None:
    """Its unit may be inactive, as that of a worker which nothing needs; its watcher tells the reason."""
    here = Host(Loaded(Settings.model_validate({"broker": {"url": redis_server.url}}), {}), root=tmp_path)
    assert isinstance(fleet.waiting(here), Finding)
    with redis_server.client() as client:
        why = "in quarantine for 20 s more: its unit failed"
        told = [{"number": 3, "excluded": why}, {"number": 4, "excluded": "masked, until it is unmasked"}]
        body = {"at": client.time()[0], "instances": told}
        client.hset(HOSTS, "far", orjson.dumps(body))
    assert fleet.waiting(here) == [
        Finding("error", f"worker 3 is {why}", "journalctl -u gpuinfer-worker@3 -n 20  # on far")
    ]


def test_a_drained_worker_is_not_forgotten(redis_server: RedisServer, tmp_path: Path) -> None:
    """It takes nothing until somebody resumes it, here or on its host."""
    here = Host(Loaded(Settings.model_validate({"broker": {"url": redis_server.url}}), {}), root=tmp_path)
    assert isinstance(fleet.paused(here), Finding)
    with redis_server.client() as client:
        for worker in (f"gpu0@{socket.gethostname()}", "gpu3@far"):
            set_drained(client, worker, drained=True)
    found = fleet.paused(here)
    assert not isinstance(found, Finding)
    assert [one.status for one in found] == ["warning", "warning"]
    assert {one.remedy for one in found} == {
        f"gpuinfer worker resume 0  # on {socket.gethostname()}",
        "gpuinfer worker resume 3  # on far",
    }
