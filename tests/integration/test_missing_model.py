# SPDX-License-Identifier: Apache-2.0
"""A model that cannot be loaded does not stop its worker's others, and everybody can see which and why."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from gpuinfer import Client
from gpuinfer.doctor import fleet
from gpuinfer.doctor.host import Finding, Host
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import catalogue, heartbeats, keys
from gpuinfer.queue.cli import status
from gpuinfer.settings import Loaded, Settings
from tests.models_for_tests import picky, write_manifest
from tests.services import RedisServer
from tests.workers import NAME, Workers, wait_until

pytestmark = pytest.mark.integration

WHY = "it is neither TorchScript nor a torch.export file"


def test_the_others_are_served(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Log, heartbeat, catalogue, status and doctor name it; it does not hand its place as the default on."""
    images, labels = load_test_images()
    broken = workers.folder / "models" / "broken"
    broken.mkdir(parents=True)
    (broken / "model.pt").write_text("<html>")
    write_manifest(broken, "model.pt", '[[inputs]]\nname = "x"\nshape = [1]\n[[outputs]]\nname = "y"\n')
    shy = workers.folder / "models" / "shy"
    picky(shy)
    worker = workers.start(worker_models="broken,digits,shy")
    (told,) = [json.loads(line) for line in worker.lines() if '"model_not_loaded"' in line]
    assert (told["level"], told["model"], told["code"]) == ("error", "broken", "model_load_failed")
    assert WHY in told["reason"]
    answer = client.result(client.submit(images[0].tolist(), model="digits"), timeout_s=60)
    assert answer["class"] == labels[0]

    with redis_server.client() as connection:
        wait_until(lambda: NAME in heartbeats.fresh(connection), 60)
        beat = heartbeats.fresh(connection)[NAME]
        assert beat["models"] == ["digits", "shy"]
        assert WHY in beat["missing"]["broken"]
        assert connection.get(keys.DEFAULT_MODEL) is None
        connection.zadd(keys.CATALOGUE, {"broken": beat["at"]})  # as another host's worker would
        client.submit([1.0], model="broken")
        known = catalogue.read(connection)
    model = known.models["broken"]
    assert (model.serving, list(model.missing)) == (False, [NAME])
    assert WHY in str(known.unserved[0])

    settings = Settings.model_validate({"broker": {"url": redis_server.url}})
    said = CliRunner().invoke(status, [], obj=Loaded(settings, {}))
    assert f"{NAME} serves without broken: " in said.output
    assert json.loads(CliRunner().invoke(status, ["--json"], obj=Loaded(settings, {})).output)["models"]
    found = fleet.workers(Host(Loaded(settings, {})))
    assert not isinstance(found, Finding)
    assert [one.status for one in found] == ["ok", "warning"]
    assert f"{NAME} serves without broken: " in found[1].message


def test_without_any_it_ends(workers: Workers) -> None:
    """As a worker of one model always did: the code of the first error, which is said."""
    worker = workers.start(ready=False, worker_models="nobody,noone")
    assert worker.wait() == 65
    assert "there is no model 'nobody'" in worker.text()
    assert '"worker_ready"' not in worker.text()
