# SPDX-License-Identifier: Apache-2.0
"""The accounts of a real front: every request is in them, whatever kills a process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from signal import SIGKILL, SIGTERM

import orjson
import pytest
from click.testing import CliRunner

from gpuinfer.api.schemas import DIGIT
from gpuinfer.cli import cli
from gpuinfer.models.signature import Input, Signature
from gpuinfer.queue.usage import read
from tests.apis import Api, HandWorker
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def requests(server: RedisServer) -> int:
    with server.client() as client:
        return sum(one.requests for one in read(client).accounts)


def test_every_request_counts_once(redis_server: RedisServer, worker: HandWorker, tmp_path: Path) -> None:
    """By model, with its bytes; what was counted last is written when the front stops."""
    image = Input(name="image", kind="tensor", dtype="float32", shape=(1, 8, 8))
    worker.store.membership.signatures = {"digits": orjson.dumps(Signature(inputs=(image,)).to_json())}
    worker.register()
    body = orjson.dumps(DIGIT)
    with Api(redis_server, tmp_path) as api:
        sent = sum(len(api.http.post("/predict", content=body).content) for _ in range(7))
        assert api.http.post("/models/nobodys/predict", content=body).status_code == 404
        assert api.http.post("/predict", content=b"[1]").status_code == 422
        assert api.http.post("/models/digits/predict", content=b"[1]").status_code == 422
        made_up = b'{"inputs": [1], "model": "made up"}'
        assert api.http.post("/predict", content=made_up).status_code == 422
        assert api.http.get("/health/live").status_code == 200  # a probe is no request
        wait_until(lambda: requests(redis_server) == 11, 60)
        answer = api.http.get("/usage?by=model&since=1h")
        assert answer.status_code == 200
        found = {one["model"]: one for one in answer.json()["usage"]}
        assert (found["-"]["requests"], found["-"]["errors"]) == (2, 2)
        digits = found["digits"]
        assert (digits["requests"], digits["errors"]) == (9, 2), "refused by the model, named or not"
        assert (digits["bytes_in"], digits["bytes_out"] > sent) == (7 * len(body) + 2 * len(b"[1]"), True)
        for wrong in ("by=user", "since=1y", "until=1"):
            assert api.http.get(f"/usage?{wrong}").status_code in (400, 422)
        api.process.terminate()
    assert requests(redis_server) == 15  # nothing is lost in an orderly end
    environment = {"GPUINFER_BROKER_URL": redis_server.url}
    shown = CliRunner().invoke(cli, ["usage", "--by", "key", "--json"], env=environment)
    assert shown.exit_code == 0, shown.output
    assert [(one["key"], one["requests"]) for one in json.loads(shown.output)["usage"]] == [("-", 15)]
    table = CliRunner().invoke(cli, ["usage"], env=environment)
    assert "digits" in table.output and "device seconds" in table.output


def test_a_kill_costs_a_second_at_most(redis_server: RedisServer, tmp_path: Path) -> None:
    """What was flushed stays, and what comes afterwards is added: no sum falls, none counts twice."""
    with Api(redis_server, tmp_path) as api:
        for _ in range(5):
            api.http.get("/queues")
        wait_until(lambda: requests(redis_server) == 5, 60)
        os.kill(api.process.pid, SIGKILL)
        api.process.wait()
    (tmp_path / "api.log").unlink()
    with Api(redis_server, tmp_path) as api:
        for _ in range(3):
            api.http.get("/queues")
        api.process.send(SIGTERM)
        api.process.wait()
    assert requests(redis_server) == 8
