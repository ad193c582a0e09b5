# SPDX-License-Identifier: Apache-2.0
"""When the front calls itself ready: a live worker, or an instance that a live watcher may start."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gpuinfer.api.health import readiness
from gpuinfer.errors import NotReady, UnknownModel
from gpuinfer.queue.fleet import serves_of
from gpuinfer.queue.readiness import Capacity, parse
from gpuinfer.settings import QUEUES
from gpuinfer.watcher.hosts import _told
from gpuinfer.watcher.state import Instance, Key

pytestmark = pytest.mark.unit

NOW = 1000.0


def beat(*models: str, age_s: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a worker's heartbeat."""
    return {"at": NOW - age_s, "models": list(models), "queues": list(QUEUES), "state": "idle", **more}


def host(*instances: dict[str, object], age_s: float = 1.0) -> dict[str, bytes]:
    """Return what one watcher publishes."""
    return {"a": orjson.dumps({"at": NOW - age_s, "interval_s": 1.0, "instances": instances})}


def instance(**about: Any) -> dict[str, object]:
    """Return an instance as its watcher tells of it."""
    return _told(Instance(key=Key(0, "a"), serves=serves_of(QUEUES, ["digits"]), **about), NOW)


def test_a_live_worker_is_ready() -> None:
    """A heartbeat of at most 10 s counts, an older one does not, nor that of a worker that drains."""
    found = parse({"gpu0@a": beat("digits", age_s=9.9)}, {}, NOW)
    assert readiness(found) == {"status": "ok", "workers": 1, "startable": 0}
    for body in (beat("digits", age_s=10.1), beat("digits", state="draining")):
        with pytest.raises(NotReady, match="no live worker serves any model"):
            readiness(parse({"gpu0@a": body}, {}, NOW))


def test_what_a_live_watcher_may_start_is_starting() -> None:
    """A stopped instance that nothing excludes, and one that starts, also where the watcher only logs."""
    for one in (instance(), instance(state="activating"), instance(state="activating", log_only=True)):
        assert readiness(parse({}, host(one), NOW)) == {"status": "starting", "workers": 0, "startable": 1}


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"masked": True}, "masked"),
        ({"excluded": "cooling down for 20 s"}, "cooling down for 20 s"),
        ({"state": "activating", "excluded": "cooling down"}, "cooling down"),
        ({"log_only": True}, "only logs"),
        ({"state": "active"}, "sends no heartbeat"),
    ],
)
def test_what_is_not_started_does_not_count(about: dict[str, Any], reason: str) -> None:
    """503, and the error says of each instance why it is not started."""
    with pytest.raises(NotReady, match=f"gpu0@a: .*{reason}") as caught:
        readiness(parse({}, host(instance(**about)), NOW))
    assert caught.value.http_status == 503


def test_a_silent_watcher_starts_nothing() -> None:
    """Its instances count only while it is alive."""
    with pytest.raises(NotReady, match="watcher is silent"):
        readiness(parse({}, host(instance(), age_s=11), NOW))


def test_one_model() -> None:
    """A model is ready by those that serve it alone; one that its host cannot load is not started there."""
    beats = {"gpu1@a": beat("resnet", missing={"vqa": "no torchvision"})}
    found = parse(beats, host(instance()), NOW, ["digits", "resnet", "vqa"])
    assert readiness(found, "resnet") == {"status": "ok", "workers": 1, "startable": 0, "model": "resnet"}
    assert readiness(found, "digits")["status"] == "starting"
    with pytest.raises(NotReady, match="serves model vqa") as caught:
        readiness(found, "vqa")
    assert caught.value.field == "model"
    with pytest.raises(UnknownModel, match="known: digits, resnet, vqa"):
        readiness(found, "nosuch")
    absent = {"gpu1@a": beat("resnet", missing={"digits": "no file"})}
    with pytest.raises(NotReady, match="cannot be loaded"):
        readiness(parse(absent, host(instance()), NOW, ["digits"]), "digits")


@pytest.mark.parametrize("state", ["draining", "drained"])
def test_a_drained_worker_is_no_capacity(state: str) -> None:
    """It runs and beats, and takes nothing: what is missing is told, and what it may be."""
    told = host(instance(state="active"))
    found = parse({"gpu0@a": beat("digits") | {"state": state}}, told, NOW)
    assert (found.live, found.startable, found.excluded) == ({}, {}, {"gpu0@a": "it is drained"})
    with pytest.raises(NotReady, match="it is drained"):
        readiness(found)


def test_versions_are_those_of_live_workers() -> None:
    """Each once, sorted; what a worker does not tell, or tells wrongly, is not known."""
    beats = {
        "gpu0@a": beat("digits", "vqa", versions={"digits": "b", "vqa": ""}),
        "gpu1@a": beat("digits", versions={"digits": "a"}),
        "gpu2@a": beat("digits", versions={"digits": "b", "vqa": ["x"]}),
        "gpu3@a": beat("digits", versions={"digits": "c"}, age_s=60),
        "gpu4@a": beat("digits", versions=["d"]),
    }
    assert parse(beats, {}, NOW).of("digits").versions == {"digits": ("a", "b")}


def test_what_cannot_be_read_counts_for_nothing() -> None:
    """Garbage under the watchers' key, or a heartbeat of another kind, is no capacity and no crash."""
    for text in (b"x", b"[]", b"{}", b'{"at": 1000, "instances": 5}', b'{"at": "x", "instances": []}'):
        assert parse({"w": {"at": NOW, "models": 5}}, {"a": text}, NOW) == Capacity()
