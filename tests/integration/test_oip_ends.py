# SPDX-License-Identifier: Apache-2.0
"""What becomes of a request of the Open Inference Protocol that nobody waits for any longer."""

from __future__ import annotations

import socket
from typing import Any

import orjson
import pytest

from gpuinfer import Client
from gpuinfer.models.signature import Input, Signature
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.message import decode
from tests.apis import Api, HandWorker
from tests.workers import wait_until

pytestmark = pytest.mark.integration

TENSOR = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
PLACE = "/v2/models/digits/infer"


@pytest.fixture
def served(worker: HandWorker) -> HandWorker:
    """A worker that is alive and says what its model takes; it does nothing by itself."""
    signature = Signature(inputs=(Input(name="x", kind="tensor", dtype="float32", shape=()),))
    worker.store.membership.signatures = {"digits": orjson.dumps(signature.to_json())}
    worker.beat()
    return worker


def infer(api: Api, **parameters: Any) -> Any:
    return api.http.post(PLACE, json={"inputs": [TENSOR], "parameters": parameters})


def test_a_timeout_ends_the_task(api: Api, served: HandWorker, client: Client) -> None:
    """504, and what nobody can ask for has ended before a worker has claimed it."""
    answer = infer(api, timeout=200_000)
    assert (answer.status_code, list(answer.json())) == (504, ["error"]), answer.text
    assert "did not end within 0.2 s" in answer.json()["error"]
    (claimed,) = served.claim()
    assert client.status(decode(claimed.payload).id).state == "revoked"


def test_a_caller_that_leaves_ends_the_task(api: Api, served: HandWorker, client: Client) -> None:
    """Its task is cancelled while it runs."""
    host, _, port = api.address.removeprefix("http://").partition(":")
    body = orjson.dumps({"inputs": [TENSOR]})
    head = f"POST {PLACE} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    found: list[Claimed] = []

    def claimed() -> list[Claimed]:
        found.extend(served.claim())
        return found

    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        wait_until(claimed, 60)
        task_id = served.begin(found[0])
    wait_until(lambda: client.status(task_id).state == "revoked", 60)


def test_no_request_chooses_among_versions(api: Api, served: HandWorker) -> None:
    """501 while workers have several, 404 for one that none has; the description names them all."""
    body = {"queues": served.store.queues, "models": ["digits"]}
    for worker, version in (("gpu0@test", "a"), ("gpu1@test", "b")):
        other = HandWorker(served.store.client, name=worker)
        other.store.membership.signatures = served.store.membership.signatures
        other.store.register(orjson.dumps(body | {"worker": worker, "versions": {"digits": version}}))
    assert api.http.get("/v2/models/digits").json()["versions"] == ["a", "b"]
    index = api.http.post("/v2/repository/index").json()
    assert [(one["version"], one["state"]) for one in index] == [("a", "READY"), ("b", "READY")]
    for version, status, words in (("a", 501, "leave out the version"), ("c", 404, "they have a, b")):
        refused = api.http.post(f"/v2/models/digits/versions/{version}/infer", json={"inputs": [TENSOR]})
        assert (refused.status_code, words in refused.json()["error"]) == (status, True), refused.text


def test_what_cannot_be_asked(api: Api, served: HandWorker) -> None:
    """Parameters, paths and methods, each with what would be right."""
    for answer, status, words in (
        (infer(api, priority=-1), 400, "parameters.priority: must be a whole number"),
        (infer(api, timeout=1.5), 400, "parameters.timeout: must be a number of microseconds"),
        (infer(api, queue="fast"), 400, "parameters.queue: must be one of realtime"),
        (api.http.get(PLACE), 405, "takes POST, not GET"),
        (api.http.get("/v2/nowhere"), 404, "there is no /v2/nowhere"),
        (api.http.post("/v2/repository/index", content=b"[]"), 400, "must be an object"),
        (api.http.post(PLACE, content=b"{", headers={"content-encoding": "br"}), 415, "gzip or deflate"),
    ):
        assert answer.status_code == status, answer.text
        assert words in answer.json()["error"]
    assert api.http.head("/v2/health/live").status_code == 200
    assert api.http.get("/v2/").json()["name"] == "gpuinfer"
    ready = api.http.post("/v2/repository/index", json={"ready": True}).json()
    assert [one["name"] for one in ready] == ["digits"]
