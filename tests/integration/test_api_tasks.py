# SPDX-License-Identifier: Apache-2.0
"""A task as a resource, over HTTP, on a real Redis under the API's rights where it has them."""

from __future__ import annotations

import io
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpuinfer.errors import ShapeMismatch
from gpuinfer.models.answers import to_json
from gpuinfer.queue import keys
from gpuinfer.queue.message import decode
from tests.apis import Api, HandWorker, submit
from tests.services import RedisServer

pytestmark = pytest.mark.integration


def test_from_queued_to_deleted(api: Api, worker: HandWorker) -> None:
    """Each state of one task; its bare result; its place in the list; and that it is gone at the end."""
    worker.register()
    body = {"inputs": [1], "metadata": {"user": "7"}}
    task_id = api.http.post("/predict", json=body).json()["task_id"]
    url = f"/tasks/{task_id}"
    found = api.http.get(url).json()
    assert (found["id"], found["status"], found["urls"]["self"]) == (task_id, "queued", url)
    assert (found["queue"], found["model"], found["metadata"]) == ("realtime", "digits", {"user": "7"})
    assert (found["position"], found["estimated_start_at"]) == (1, None)
    assert (created := found["created_at"])
    behind = f"/tasks/{submit(api)}"
    assert api.http.get(behind).json()["position"] == 2
    assert api.http.get(f"{url}/result").status_code == 202
    refused = api.http.delete(url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "wrong_state")
    (task,) = worker.claim()
    assert decode(task.payload).metadata == {"user": "7"}
    found = api.http.get(url).json()
    assert (found["status"], found["position"], found["created_at"]) == ("queued", 1, created)
    found = api.http.get(behind).json()
    assert found["position"] == 1
    assert found["estimated_start_at"] > found["created_at"]
    worker.begin(task)
    assert api.http.get(url).json()["status"] == "running"
    worker.finish(task, {"label": "2"})
    found = api.http.get(url, params={"wait": 5}).json()
    assert (found["status"], found["result"]) == ("completed", {"label": "2"})
    bare = api.http.get(f"{url}/result")
    assert (bare.status_code, bare.json()) == (200, {"label": "2"})
    assert api.http.post(f"{url}/cancel").status_code == 409
    assert api.http.post(f"{url}/retry").json()["error"]["code"] == "wrong_state"
    listed = api.http.get("/tasks", params={"limit": 1}).json()
    assert [one["id"] for one in listed["tasks"]] == [task_id]
    assert api.http.delete(url).status_code == 204
    gone = api.http.get(url)
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "result_gone")
    assert api.http.get("/tasks/nobody").status_code == 404


def test_a_restart_forgets_no_task(
    redis_server: RedisServer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What has expired is a 410 after a restart of the front, too: by our ids, and by a client's own."""
    with redis_server.client() as client:
        HandWorker(client).register()
        with Api(redis_server, tmp_path) as first:
            ids = [submit(first), "own-1"]
            assert first.http.put("/tasks/own-1", json=[1]).status_code == 202
        client.delete(*map(keys.result, ids))
        with Api(redis_server, tmp_path_factory.mktemp("second")) as second:
            for task_id in ids:
                for path in (f"/tasks/{task_id}", f"/tasks/{task_id}?wait=60", f"/result/{task_id}?wait=60"):
                    gone = second.http.get(path)
                    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "result_gone"), path
                assert second.http.delete(f"/tasks/{task_id}").status_code == 410
                assert second.http.post(f"/tasks/{task_id}/cancel").status_code == 410
            assert second.http.get("/tasks/own-2").status_code == 404
            assert second.http.get(f"/tasks/{uuid.uuid4()}").status_code == 404


def test_a_failure_and_a_text(api: Api, worker: HandWorker) -> None:
    """The bare result of a failed task has its error's status; a text is one; the next page has its URL."""
    first = submit(api)
    (task,) = worker.claim()
    worker.finish(task, ShapeMismatch("must have shape [1, 8, 8]", "inputs"))
    failed = api.http.get(f"/tasks/{first}/result")
    assert (failed.status_code, failed.json()["error"]["code"]) == (422, "shape_mismatch")
    assert api.http.get(f"/tasks/{first}").json()["error"]["field"] == "inputs"
    second = submit(api)
    (task,) = worker.claim()
    worker.finish(task, "a cat")
    text = api.http.get(f"/tasks/{second}/result")
    assert (text.text, text.headers["content-type"]) == ("a cat", "text/plain; charset=utf-8")
    page = api.http.get("/tasks?limit=1").json()
    assert [one["id"] for one in page["tasks"]] == [second]
    assert page["next"].startswith("/tasks?limit=1&before=")
    assert api.http.get(page["next"]).json()["tasks"][0]["id"] == first


def test_a_result_has_a_type_of_its_own(api: Api, worker: HandWorker) -> None:
    """A Python model's image, bytes and text are that; an array is a .npy file on request; JSON always."""
    picture, array = Image.new("RGB", (3, 2), "red"), np.arange(6, dtype=np.float32).reshape(2, 3)

    def ended(answer: object) -> str:
        task_id = submit(api)
        (task,) = worker.claim()
        worker.finish(task, {"output": to_json(answer), "model": "digits", "device": "cpu"})
        return f"/tasks/{task_id}/result"

    image = ended(picture)
    found = api.http.get(image)
    assert found.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(found.content)).getpixel((2, 1)) == (255, 0, 0)
    as_json = api.http.get(image, headers={"accept": "application/json"}).json()
    assert as_json["output"]["type"] == "image/png"
    for answer, content_type, content in (
        (b"\0\1", "application/octet-stream", b"\0\1"),
        ("\u00e4", "text/plain; charset=utf-8", "\u00e4".encode()),
    ):
        found = api.http.get(ended(answer))
        assert (found.headers["content-type"], found.content) == (content_type, content)
    npy = api.http.get(ended(array), headers={"accept": "application/x-npy"})
    assert npy.headers["content-type"] == "application/x-npy"
    assert np.load(io.BytesIO(npy.content)).tolist() == array.tolist()
    refused = api.http.get(image, headers={"accept": "application/x-npy"})
    assert (refused.status_code, refused.json()["error"]["field"]) == (406, "Accept")


def test_cancel(api: Api) -> None:
    """A waiting task is cancelled once, and told so twice; an unknown one is a 404."""
    url = f"/tasks/{submit(api)}"
    for _ in range(2):
        cancelled = api.http.post(f"{url}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert api.http.get(f"{url}/result").status_code == 410
    assert api.http.post("/tasks/nobody/cancel").status_code == 404


def test_queues_and_workers(api: Api, worker: HandWorker) -> None:
    """What waits, and who beats."""
    submit(api)
    assert api.http.get("/queues").json()["waiting"] == 1
    assert all({"worker", "alive", "seen_s"} <= set(one) for one in api.http.get("/workers").json())


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("status=done", 422, "status"),
        ("limit=0", 422, "limit"),
        ("limit=x", 422, "limit"),
        ("before=soon", 422, "before"),
        ("page=2", 400, "page"),
    ],
)
def test_what_cannot_be_asked(api: Api, query: str, status: int, field: str) -> None:
    """The parameter is named."""
    response = api.http.get(f"/tasks?{query}")
    assert (response.status_code, response.json()["error"]["field"]) == (status, field)
