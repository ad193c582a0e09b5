# SPDX-License-Identifier: Apache-2.0
"""One call for a prediction: submit and wait at once, a model in the path, an id of the client's own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gpuinfer.api import schemas
from gpuinfer.errors import ShapeMismatch
from gpuinfer.queue import keys
from tests.apis import Api, HandWorker
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def while_working(worker: HandWorker, result: Any, ask: Callable[[], httpx.Response]) -> httpx.Response:
    """Ask, and end what is submitted by it while the request waits."""
    worker.register()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        wait_until(lambda: worker.finish_all(result) > 0, 60)
        return answer.result(60)


@pytest.mark.parametrize(
    ("path", "headers", "applied"),
    [
        ("/predict", {"Prefer": "wait=60"}, "wait=60"),
        ("/predict?wait=60", {}, None),
        ("/models/digits/predict", {"Prefer": "respond-async, WAIT=60"}, "wait=60"),
        ("/batch_predict", {"Prefer": 'wait="60"; x=y'}, "wait=60"),
    ],
)
def test_one_call(
    api: Api, worker: HandWorker, path: str, headers: dict[str, str], applied: str | None
) -> None:
    """200 with the task when it ended in time, and what was preferred is said to have been applied."""
    body = [schemas.DIGIT] if "batch" in path else schemas.DIGIT
    response = while_working(worker, "done", lambda: api.http.post(path, json=body, headers=headers))
    assert (response.status_code, response.headers.get("preference-applied")) == (200, applied)
    assert (response.json()["status"], response.json()["result"]) == ("completed", "done")


def test_one_call_of_a_failed_task_is_a_200(api: Api, worker: HandWorker) -> None:
    """The request succeeded; the task has failed, and says why."""
    error = ShapeMismatch("must have shape [1, 8, 8]", "inputs")
    response = while_working(worker, error, lambda: api.http.post("/predict?wait=60", json=[1]))
    assert (response.status_code, response.json()["status"]) == (200, "failed")
    assert response.json()["error"]["code"] == "shape_mismatch"


def test_one_call_that_is_not_ended_in_time(api: Api, worker: HandWorker) -> None:
    """202 with the task as it is, and where to look for it."""
    worker.register()
    response = api.http.post("/predict?wait=0.05", json=[1])
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    assert worker.finish_all("done") == 1
    assert api.http.get(response.headers["location"]).json()["result"] == "done"


def test_the_model_of_the_path_or_the_url(api: Api, worker: HandWorker) -> None:
    """It is the model that runs; one nobody knows is a 404, and two that differ are refused."""
    worker.register()
    assert api.http.post("/models/digits/predict", json=[1]).status_code == 202
    assert api.http.post("/predict?model=digits", json=[1]).status_code == 202
    assert {keys.place_of(task.list_key).model for task in worker.claim(2)} <= {"", "digits"}
    for path in ("/models/nosuch/predict", "/predict?model=nosuch"):
        unknown = api.http.post(path, json=[1])
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")
    two = api.http.post("/models/digits/predict", json={"inputs": [1], "model": "other"})
    assert (two.status_code, two.json()["error"]["field"]) == (422, "model")


@pytest.mark.parametrize("path", ["/predict?modle=digits", "/models/digits/predict?Model=x", "/predict?x"])
def test_an_unknown_query_parameter_is_named(api: Api, path: str) -> None:
    """400, with its name and those that are known: a misspelt option is not left out silently."""
    response = api.http.post(path, json=[1])
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unknown_parameter")
    assert error["field"] in ("modle", "Model", "x")
    assert "model" in error["message"]
    assert "wait" in error["message"]


def test_waits_end_when_the_front_stops(api: Api, worker: HandWorker) -> None:
    """A caller of one call is told its task's state and id when the process is told to stop."""
    worker.register()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.http.post, "/predict?wait=60", json=[1])
        wait_until(lambda: len(worker.claim()) == 1, 60)
        api.process.send(signal.SIGTERM)
        assert answer.result(60).status_code == 202


def test_an_id_of_the_clients_own(api: Api, worker: HandWorker) -> None:
    """PUT is safe to repeat, whatever the white space, also once it has ended; another body is a 409."""
    worker.register()
    first = api.http.put("/tasks/order:1", json=[1, 2])
    assert (first.status_code, first.json()["id"], first.json()["status"]) == (202, "order:1", "queued")
    assert api.http.put("/tasks/order:1", content=b'{"inputs": [1,2 ]}').status_code == 202
    for body in ({"inputs": [1, 3]}, {"inputs": [1, 2], "top_k": 2}):
        other = api.http.put("/tasks/order:1", json=body)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "task_exists")
    large = ["x" * 100_000]
    assert api.http.put("/tasks/large", json=large).status_code == 202
    assert api.http.put("/tasks/large", json=["y" * 100_000]).status_code == 409
    assert api.http.put("/tasks/large", json=large).status_code == 202
    order, second = worker.claim(10)
    assert worker.store.body("large") is not None
    worker.finish(order, "done")
    worker.finish(second, "done")
    again = api.http.put("/tasks/order:1", json=[1, 2])
    assert (again.status_code, again.json()["result"]) == (200, "done")
    assert api.http.put("/tasks/order:1", json=[1, 3]).status_code == 409
    assert worker.claim(10) == []
    # An id that a POST was given, one that was cancelled, one that nobody may take.
    posted = api.http.post("/predict", json=[1]).json()["task_id"]
    assert api.http.put(f"/tasks/{posted}", json=[1]).status_code == 409
    assert api.http.put("/tasks/gone", json=[1]).status_code == 202
    assert api.http.post("/cancel/gone").json()["cancelled"] is True
    assert api.http.put("/tasks/gone", json=[1]).json()["status"] == "cancelled"
    bad = api.http.put("/tasks/a%20b", json=[1])
    assert (bad.status_code, bad.json()["error"]["field"]) == (422, "task_id")
    keyed = api.http.put("/tasks/k", json=[1], headers={"Idempotency-Key": "k"})
    assert (keyed.status_code, keyed.json()["error"]["field"]) == (422, "idempotency_key")
    worker.finish_all("those that wait")
    waited = while_working(worker, "soon", lambda: api.http.put("/tasks/w?wait=60", json=[1]))
    assert (waited.status_code, waited.json()["result"]) == (200, "soon")
