# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer status`` over a fleet under load: its numbers are those of who submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer.alerts.alerting import REGISTER
from gpuinfer.demo.fleet import HOSTS, Fleet, fleet
from gpuinfer.demo.private import CONFIG
from gpuinfer.queue import drained
from gpuinfer.view.actions import OnFleet
from gpuinfer.view.build import build
from gpuinfer.view.gather import Gatherer
from gpuinfer.view.rows import queue_name
from gpuinfer.view.top import Top
from tests.conftest import need
from tests.services import redis_binary

pytestmark = pytest.mark.integration

PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    """A pretended fleet that is up; nothing is submitted yet."""
    need(redis_binary() is not None, "redis-server")
    with fleet(scale=0.3) as made:
        made.start()
        with made.client() as client:
            made.await_models(client, time.monotonic() + PATIENCE_S)
        yield made


def status(folder: Path, *options: str, code: int | None = None) -> Any:
    """Run the command; return its JSON, or its text without ``--json``."""
    environment = {**os.environ, "GPUINFER_CONFIG": str(folder / CONFIG)}
    command = [sys.executable, "-m", "gpuinfer", "status", *options]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if "--json" in options else done.stdout


def until(running: Fleet, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask again and again until something holds of the status."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds(found := status(running.folder, "--json")):
        assert time.monotonic() < deadline, found
    return dict(found)


def test_the_numbers_are_those_of_who_submitted(running: Fleet) -> None:
    """Of each queue and model, by outcome, exactly; also of what failed, and of what killed its workers."""
    running.driver.start()
    running.driver.send("default", "embed", 7, fault="fail")
    running.kill()
    until(running, lambda found: found["dead_letters"] == 1)
    assert running.drain(PATIENCE_S)
    found = status(running.folder, "--json", code=1)
    sent = running.driver.to_dict()
    assert found["ended_by_queue"] == sent
    assert sent["realtime.resnet"]["dead"] == 1 and sent["default.embed"]["failed"] >= 7
    assert (found["waiting"], found["in_flight"], found["dead_letters"]) == (0, 0, 1)
    with running.client() as client:  # the watchers have told people of it
        assert '"told":true' in (client.get(REGISTER) or b"").decode().partition('"dead-letters"')[2]
    assert [one["remedy"] for one in found["troubles"] if one["check"] == "work.dead"] == [
        "gpuinfer dead list"
    ]


def test_every_host_and_gpu_of_the_fleet_is_shown(running: Fleet) -> None:
    """With what its watcher tells: memory, heat, and what each would serve."""
    found = status(running.folder, "--json")
    assert {one["name"]: one["instances"] for one in found["hosts"]} == dict.fromkeys(HOSTS, 4)
    assert len(found["workers"]) == 8
    assert all(one["gpu"]["memory_total"] == 80 * 2**30 for one in found["workers"])
    text = status(running.folder)
    assert all(host in text for host in HOSTS) and "H100" in text and "appendfsync everysec" in text


def test_a_lost_gpu_and_a_paused_queue_are_trouble(running: Fleet) -> None:
    """Each with its remedy; both pass."""
    running.lose_gpu()
    running.pause()
    running.driver.send("batch", "resnet", 5)

    def both(found: dict[str, Any]) -> bool:
        said = " ".join(one["what"] for one in found["troubles"])
        return "gpu3@gpu-b not started" in said and "batch.resnet is paused: 5 tasks" in said

    found = until(running, both)
    assert {"gpuinfer queue resume batch.resnet"} <= {one["remedy"] for one in found["troubles"]}
    (queue,) = [one for one in found["queues"] if (one["tier"], one["model"]) == ("batch", "resnet")]
    assert queue["waiting"] == 5 and queue["paused"]
    running.resume()
    until(running, lambda found: found["waiting"] == 0)


async def test_top_acts_on_the_fleet(running: Fleet) -> None:
    """What is seen, paused, drained and sent again is the fleet's; a task's log is its story."""
    failed = running.driver.send("default", "embed", 1, fault="fail")[0]
    until(running, lambda found: found["waiting"] + found["in_flight"] == 0)
    actions = OnFleet(running.loaded)
    with Gatherer(running.loaded) as gatherer:
        top = Top(lambda: build(gatherer.look()), actions, every_s=3600)
        async with top.run_test(size=(160, 40)) as pilot:
            await top.workers.wait_for_complete()
            assert top.status is not None and len(top.status.workers) == 8
            assert top.status.ended_by_queue == running.driver.to_dict()
            assert failed in [task.id for task in top.tasks if task.status == "failed"]
            await pilot.press("2", "p", "1", "d")
            await top.workers.wait_for_complete()
            await pilot.pause()
            found = build(gatherer.look())
            assert [one.paused for one in found.queues].count(True) == 1
            assert any("failed" in line for line in actions.log(failed))
            actions.retry(failed)  # it fails again, and is counted again
            running.driver.submitted["default", "embed", "failed"] += 1
    until(running, lambda found: "drained" in {one["state"] for one in found["workers"]})
    with running.client() as client:
        assert drained.names(client) == ["gpu0@gpu-a"]
    actions.drain("gpu0@gpu-a", False)
    for queue in found.queues:
        actions.pause(queue_name(queue), False)
    actions.close()


def test_without_redis_it_says_so_and_ends_with_two(tmp_path: Path) -> None:
    """The trouble has the doctor's remedy, and the rest of the screen does not pretend."""
    (tmp_path / CONFIG).write_text('[broker]\nurl = "redis://127.0.0.1:1/0"\n', encoding="utf-8")
    found = status(tmp_path, "--json", code=2)
    assert found["status"] == "error" and not found["redis"]["reachable"]
    assert found["troubles"][0]["check"] == "redis.reach" and found["troubles"][0]["remedy"]
    assert "ENDED" not in status(tmp_path, code=2)
    assert status(tmp_path, "--since", "3", code=64) == ""
