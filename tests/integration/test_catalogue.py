# SPDX-License-Identifier: Apache-2.0
"""The default model and the catalogue: what changes for tasks that wait, and what people see of them."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from click.testing import CliRunner, Result

from gpuinfer import Client
from gpuinfer.api import fleet_schemas
from gpuinfer.errors import BrokerUnavailable, UnknownModel, UsageError
from gpuinfer.models.cli import model
from gpuinfer.models.signature import Input, Signature
from gpuinfer.queue import catalogue, depth, keys, results
from gpuinfer.queue.message import PREDICT, decode
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import Loaded, Settings
from tests.apis import WORKER, Api, HandWorker
from tests.models_for_tests import picky, sleeper
from tests.services import RedisServer
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.integration

#: Two models of one float that answer differently.
DOUBLE, ROOT = "double", "root"
#: Seconds that a test waits for results on a busy machine.
PATIENCE_S = 60


def command(
    server: RedisServer, *arguments: str, folder: Path | None = None, served: Sequence[str] = ()
) -> Result:
    """Run ``gpuinfer model`` on this Redis, in this process; an error of ours is the result's exception.

    ``served`` is worker.models.
    """
    chosen = {"broker": {"url": server.url}, "models": {"folders": [folder] if folder else []}}
    if served:
        chosen["worker"] = {"models": list(served)}
    loaded = Loaded(Settings.model_validate(chosen), {})
    return CliRunner().invoke(model, arguments, obj=loaded)


def default(server: RedisServer, *arguments: str) -> str:
    """Run ``gpuinfer model default`` and return what it says."""
    done = command(server, "default", *arguments)
    assert done.exit_code == 0, done.exception
    return done.output.strip()


def models(workers: Workers) -> None:
    """Make the two models."""
    sleeper(workers.folder / "models" / DOUBLE, 0.0, max_batch_size=32)
    picky(workers.folder / "models" / ROOT)


def plain(client: redis.Redis, value: float) -> str:
    """Submit as a plain Celery producer that names no model; return the id."""
    task = Submission(task=PREDICT, inputs=[value], queue="realtime")
    client.set(keys.result(task.id), results.PENDING_META)
    client.lpush("realtime", task.encode())
    return task.id


def check(answer: dict[str, Any], value: float) -> str:
    """See that a result is what its model makes of the value; return the model."""
    right = {DOUBLE: ("twice", 2 * value), ROOT: ("root", math.sqrt(value))}
    name, expected = right[answer["model"]]
    assert answer["outputs"][name] == [pytest.approx(expected)]
    return str(answer["model"])


# -- a new default ------------------------------------------------------------------------


def test_what_waits_when_the_default_changes(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """What names the old default is passed on in its order; what names none is for the new one."""
    models(workers)
    with redis_server.client() as connection:
        HandWorker(connection, DOUBLE, ROOT).register()
        named = client.submit_many([[value] for value in range(300)])  # the client writes the name
        unnamed = [plain(connection, value) for value in range(50)]
        assert connection.llen("realtime") == 350
        assert default(redis_server, ROOT) == f"the default model is {ROOT}, it was {DOUBLE}"

        workers.start(0, worker_models=ROOT)
        answers = client.results(unnamed, PATIENCE_S)
        assert {check(answer, value) for value, answer in enumerate(answers)} == {ROOT}
        target = keys.queue_name("realtime", DOUBLE)
        wait_until(lambda: connection.llen(target) == 300, PATIENCE_S)
        payloads: list[bytes] = connection.lrange(target, 0, -1)
        assert [decode(payload).id for payload in reversed(payloads)] == named
        assert {decode(payload).deliveries for payload in payloads} == {0}

        workers.start(1, worker_models=DOUBLE)
        answers = client.results(named, PATIENCE_S)
        assert {check(answer, value) for value, answer in enumerate(answers)} == {DOUBLE}


def test_the_old_default_goes_on_without_the_new(
    workers: Workers, client: Client, redis_server: RedisServer
) -> None:
    """While no worker of the new default lives, one of the old takes what names its model; the rest waits."""
    models(workers)
    with redis_server.client() as connection:
        HandWorker(connection, DOUBLE, ROOT).register()
        workers.start(0, worker_models=DOUBLE)
        default(redis_server, ROOT)
        unnamed = [plain(connection, value) for value in range(20)]
        named = []
        for value in range(
            20
        ):  # as a client that has not heard of the change, and a Celery producer, write it
            task = Submission(task=PREDICT, inputs=[value], queue="realtime", model=DOUBLE)
            connection.set(keys.result(task.id), results.PENDING_META)
            connection.lpush("realtime", task.encode())
            named.append(task.id)
        answers = client.results(named, PATIENCE_S)
        assert {check(answer, value) for value, answer in enumerate(answers)} == {DOUBLE}
        (unserved,) = catalogue.read(connection).unserved
        assert (unserved.tier, unserved.model, unserved.tasks) == ("realtime", ROOT, 20)
        assert {client.status(task_id).state for task_id in unnamed} == {"queued"}
        workers.start(1, worker_models=ROOT)
        answers = client.results(unnamed, PATIENCE_S)
        assert {check(answer, value) for value, answer in enumerate(answers)} == {ROOT}


def test_switching_under_load(workers: Workers, client: Client, redis_server: RedisServer) -> None:
    """Nothing is lost and every answer is right, whatever was named while the default went back and forth."""
    models(workers)
    workers.start(0, worker_models=DOUBLE)
    workers.start(1, worker_models=ROOT)
    assert default(redis_server) == DOUBLE
    over = threading.Event()
    sent: dict[str, list[tuple[float, str]]] = {DOUBLE: [], ROOT: [], "ours": [], "plain": []}

    def load() -> None:
        with redis_server.client() as connection:
            value = 0.0
            while not over.is_set():
                values = [value + step for step in range(10)]
                for name in (DOUBLE, ROOT):
                    ids = client.submit_many([[it] for it in values], model=name)
                    sent[name] += zip(values, ids, strict=True)
                ids = client.submit_many([[it] for it in values])
                sent["ours"] += zip(values, ids, strict=True)
                sent["plain"] += [(it, plain(connection, it)) for it in values]
                value += 10

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for name in (ROOT, DOUBLE, ROOT, DOUBLE, ROOT):
            before = len(sent["plain"])
            wait_until(lambda before=before: len(sent["plain"]) > before + 50, PATIENCE_S)  # type: ignore[misc]
            default(redis_server, name)
        before = len(sent["plain"])
        wait_until(lambda: len(sent["plain"]) > before + 50, PATIENCE_S)
    finally:
        over.set()
        loading.join()
    for who, tasks in sent.items():
        answers = client.results([task_id for _, task_id in tasks], 2 * PATIENCE_S)
        ran = [check(answer, value) for (value, _), answer in zip(tasks, answers, strict=True)]
        if who in (DOUBLE, ROOT):
            assert set(ran) == {who}
        if who == "plain":  # a client of ours may name the old default for five seconds more
            assert set(ran[before + 10 :]) == {ROOT}, "sent after the last change"
    with redis_server.client() as connection:
        assert depth.read(connection).total_waiting == 0
        assert catalogue.read(connection).unserved == ()


def test_the_command(redis_server: RedisServer) -> None:
    """Prints and sets; refuses a name that the fleet does not know, unless there is none yet, or by force."""
    assert default(redis_server).startswith("no default model is set")
    assert json.loads(default(redis_server, "--json")) == {"default": None}
    assert default(redis_server, "early") == "the default model is early"
    with redis_server.client() as connection:
        HandWorker(connection, "digits", "resnet").register()
    assert default(redis_server, "resnet") == "the default model is resnet, it was early"
    with pytest.raises(UnknownModel, match="the fleet knows no model 'resnt'; known: digits, resnet"):
        raise command(redis_server, "default", "resnt").exception or AssertionError
    assert default(redis_server) == "resnet"
    assert json.loads(default(redis_server, "resnt", "--force", "--json")) == {
        "default": "resnt",
        "before": "resnet",
    }
    assert default(redis_server) == "resnt"
    assert isinstance(command(redis_server, "default", "No@me").exception, UsageError)
    assert "Example" in command(redis_server, "default", "--help").output
    redis_server.kill()
    assert isinstance(command(redis_server, "default").exception, BrokerUnavailable)


# -- leaving the catalogue ----------------------------------------------------------------


def test_removing_a_model(workers: Workers, redis_server: RedisServer) -> None:
    """Its files go, and the fleet forgets it; not while a live worker serves it, and not without Redis."""
    folder = workers.folder / "models"
    with redis_server.client() as connection:
        worker = HandWorker(connection, "digits", DOUBLE, ROOT)
        worker.register()
        models(workers)
        done = command(redis_server, "remove", DOUBLE, folder=folder)
        assert done.output.splitlines() == [
            f"removed {folder / DOUBLE}",
            f"{DOUBLE} is no longer in the fleet's catalogue",
        ]
        assert connection.zscore(keys.CATALOGUE, DOUBLE) is None
        worker.beat()
        done = command(redis_server, "remove", ROOT, folder=folder, served=[ROOT])
        assert f"worker.models still lists {ROOT}" in done.output
        assert f"{ROOT} is in use by {WORKER}" in done.output
        assert not (folder / ROOT).exists()
        assert connection.zscore(keys.CATALOGUE, ROOT) is not None
        connection.delete(keys.heartbeat(WORKER))
        connection.lpush(f"batch.{ROOT}", "x", "y")
        connection.sadd(keys.INDEXED, ROOT)
        # Of the package, or of another host: no files are deleted.
        for name in (ROOT, "digits"):
            done = command(redis_server, "remove", name, "--forget", folder=folder)
            assert f"{name} is no longer in the fleet's catalogue" in done.output
            waits = f"2 tasks wait for it, see gpuinfer queue purge batch.{ROOT}"
            assert (waits in done.output) == (name == ROOT)
        assert "it is still the default model" in done.output
        assert connection.zrange(keys.CATALOGUE, 0, -1) == [DOUBLE.encode()], "entered again by the heartbeat"
    models(workers)
    redis_server.kill()
    done = command(redis_server, "remove", ROOT, folder=folder)
    assert done.exit_code == 0
    assert "it drops the name after seven days without a worker" in done.output
    assert not (folder / ROOT).exists()
    assert isinstance(command(redis_server, "remove", ROOT, "--forget").exception, BrokerUnavailable)


# -- over HTTP ----------------------------------------------------------------------------


def test_models_over_http(api: Api, worker: HandWorker, redis_server: RedisServer) -> None:
    """Who serves what, what waits, and what was seen when; also for a model that no worker has served."""
    assert api.http.get("/models").json() == []
    assert api.http.post("/predict", json={"inputs": [1], "model": "early"}).status_code == 202
    with redis_server.client() as connection:
        HandWorker(connection, "digits", "resnet").register()
        worker.beat()
        api.http.post("/predict", json={"inputs": [1], "model": "resnet", "queue": "batch"})
        api.http.post("/predict", json={"inputs": [1]})
        seen = connection.zscore(keys.CATALOGUE, "digits")
    digits, early, resnet = api.http.get("/models").json()
    assert [api.http.get(f"/models/{one['name']}").json() for one in (digits, early, resnet)] == [
        digits,
        early,
        resnet,
    ]
    unknown = api.http.get("/models/resnets")
    assert (unknown.status_code, unknown.json()["error"]) == (
        404,
        {
            "code": "unknown_model",
            "message": "the fleet knows no model 'resnets'; known: digits, early, resnet",
            "field": "model",
        },
    )
    at = digits.pop("last_seen")
    assert digits == {
        "name": "digits",
        "default": True,
        "serving": True,
        "queues": ["realtime", "default", "batch"],
        "workers": 1,
        "missing": {},
        "waiting": {"realtime": 1, "default": 0, "batch": 0},
        "paused": [],
    }
    assert catalogue.ModelState(name="digits", last_seen=seen).to_dict()["last_seen"] == at
    assert (early["name"], early["last_seen"], early["waiting"]["realtime"]) == ("early", None, 1)
    assert (resnet["serving"], resnet["workers"], resnet["queues"]) == (False, 0, [])
    assert resnet["waiting"] == {"realtime": 0, "default": 0, "batch": 1}
    assert at.endswith("+00:00")


def test_models_are_documented(api: Api) -> None:
    """With an example that has what the answer has."""
    paths = api.http.get("/openapi.json").json()["paths"]
    spec = paths["/models"]["get"]["responses"]["200"]
    (example,) = spec["content"]["application/json"]["examples"].values()
    of_one = paths["/models/{model}"]["get"]["responses"]["200"]["content"]["application/json"]["examples"]
    assert [one["value"] for one in of_one.values()] == example["value"]
    fields = list(catalogue.ModelState(name="x").to_dict())
    assert [list(model) for model in example["value"]] == [fields] * 2
    assert fleet_schemas.MODEL["required"] == fields


def test_a_models_example_is_documented(api: Api, worker: HandWorker, redis_server: RedisServer) -> None:
    """/docs has the example of each model that the fleet knows, and it can be sent as it stands."""
    inputs = (Input(name="x", kind="tensor", dtype="float32", shape=(2,)),)
    signature = Signature(inputs=inputs).with_example(np.array([1.5, 2.5]))
    assert Signature.from_json(signature.to_json()) == signature
    assert Signature(inputs=inputs).with_example(b"a file").example is None
    worker.store.membership.signatures = {"digits": json.dumps(signature.to_json()).encode()}
    worker.register()
    paths = api.http.get("/openapi.json").json()["paths"]
    for path, value in (("/predict", [1.5, 2.5]), ("/batch_predict", [[1.5, 2.5]])):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]
        shown = body["examples"]["model digits"]["value"]
        assert shown == {"inputs": value, "model": "digits"}
        assert api.http.post(path, json=shown).status_code == 202
    schema = api.http.get("/openapi.json").json()["components"]["schemas"]["inputs.digits"]
    assert schema["anyOf"][0]["minItems"] == 2
    page = api.http.get("/docs").text
    assert "curl -d" in page
    assert '{"inputs": [1.5, 2.5], "model": "digits"}' in page
    assert "Nested lists, shape [2], as float32." in page
    assert "/openapi.json" in page
    # A host without internet shows all of it.
    assert {
        url for url in re.findall(r"https?://[^\s\"'<]*", page) if not url.startswith(api.address)
    } == set()
    assert "src=" not in page
    redis_server.kill()
    assert "No models are known" in api.http.get("/docs").text
    assert "model digits" not in api.http.get("/openapi.json").text


def test_an_unknown_model_over_http(api: Api, worker: HandWorker) -> None:
    """404 with the names that are known; a known one without a worker is accepted."""
    worker.register()
    for path, inputs in (("/predict", [1]), ("/batch_predict", [[1], [2]])):
        response = api.http.post(path, json={"inputs": inputs, "model": "resnet"})
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["field"]) == ("unknown_model", "model")
        assert error["message"].endswith("known: digits")
        assert api.http.post(path, json={"inputs": inputs, "model": "digits"}).status_code == 202
    assert len(worker.claim(10)) == 2


def test_models_without_redis(api: Api, redis_server: RedisServer) -> None:
    """503, as everywhere."""
    redis_server.kill()
    assert api.http.get("/models").status_code == api.http.get("/models/digits").status_code == 503
