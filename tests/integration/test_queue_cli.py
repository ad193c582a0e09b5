# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer submit``, ``result``, ``cancel``, ``queue`` and ``dead`` as processes, on a real Redis."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from gpuinfer.client.sync import Client
from gpuinfer.errors import DeadLettered, InputError, ShapeMismatch, TaskNotFound, UnknownModel
from gpuinfer.keys import cli as keys_cli
from gpuinfer.models.tensors import encode_array
from gpuinfer.queue import dead, depth, keys
from gpuinfer.queue.message import decode
from gpuinfer.settings import Loaded, Settings
from tests.apis import WORKER, HandWorker
from tests.services import RedisServer

pytestmark = pytest.mark.integration


class Cli:
    """Runs ``gpuinfer`` on one Redis."""

    def __init__(self, server: RedisServer) -> None:
        self.environment = os.environ | {"GPUINFER_BROKER_URL": server.url}

    def __call__(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpuinfer", *arguments]
        return subprocess.run(
            command,
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def json(self, *arguments: str, code: int = 0) -> Any:
        """Run with --json; return what it printed."""
        done = self(*arguments, "--json")
        assert done.returncode == code, done.stderr + done.stdout
        return json.loads(done.stdout)


@pytest.fixture
def cli(redis_server: RedisServer) -> Cli:
    """The command on this test's Redis."""
    return Cli(redis_server)


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[HandWorker]:
    """Somebody who ends tasks."""
    with redis_server.client() as client:
        yield HandWorker(client)


@pytest.fixture
def client(redis_server: RedisServer, settings_for: Callable[..., Settings]) -> Iterator[Client]:
    """A client on this test's Redis."""
    with Client(settings_for(redis_server)) as opened:
        yield opened


def sent(worker: HandWorker) -> list[Any]:
    """Return the inputs of all that waits."""
    return [decode(task.payload).body()[0][0] for task in worker.claim(100)]


# -- submit and result --------------------------------------------------------------------


def test_every_way_to_give_an_input(cli: Cli, worker: HandWorker, tmp_path: Path) -> None:
    """JSON text, files of JSON and numpy, standard input; several at once, in order."""
    (tmp_path / "a.json").write_text("[[1, 2]]")
    np.save(tmp_path / "b.npy", np.array([[3.5, 4.5]], dtype=np.float32))
    done = cli("submit", "[7]", str(tmp_path / "a.json"), str(tmp_path / "b.npy"), "-", text="[9]")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    array = encode_array(np.array([[3.5, 4.5]], np.float32), "b64")
    assert sent(worker) == [[7], [[1, 2]], array, [9]]


def test_options_of_submit(cli: Cli, redis_server: RedisServer, tmp_path: Path) -> None:
    """They stand in the message; a batch job takes its list from one file."""
    worker = HandWorker(redis_server.client(), "digits", "m")
    np.save(tmp_path / "many.npy", np.zeros((3, 2)))
    body = cli.json(
        *("submit", "--batch", "--model", "m", "--priority", "7", "--queue", "default"),
        *("--top-k", "2", "--expires", "60", "--time-limit", "9", str(tmp_path / "many.npy")),
    )
    (task,) = worker.claim(10)
    envelope = decode(task.payload)
    assert [envelope.id] == body["task_ids"]
    assert envelope.task == "gpuinfer.batch_predict"
    assert keys.place_of(task.list_key) == ("default", "m", "", 7)
    zeros = encode_array(np.zeros(2), "b64")
    assert envelope.body()[:2] == ([[zeros] * 3], {"model": "m", "top_k": 2})
    assert envelope.headers["timelimit"] == [9.0, None]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("[1,", "is not JSON"),
        ("three.txt", "is not JSON, and there is no such file"),
        ("nobody.json", "there is no such file"),
        ("nobody.npy", "there is no such file"),
        ("@[1]", "there is no such file"),
    ],
)
def test_what_is_no_input(cli: Cli, argument: str, words: str) -> None:
    """Told in one line, with exit code 65."""
    done = cli("submit", argument)
    assert done.returncode == 65
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_option_is_a_wrong_call(cli: Cli) -> None:
    """64 for a value that is read late, too, and the option's name."""
    for arguments in (
        ("task", "list", "--before", "yesterday"),
        ("usage", "--since", "yesterday"),
        ("task", "list", "--model", "a b"),
    ):
        error = cli.json(*arguments, code=64)["error"]
        assert (error["code"], error["field"]) == ("bad_usage", arguments[-2])


def test_a_key_for_a_model_that_nobody_knows(
    worker: HandWorker,
    settings_for: Callable[..., Settings],
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is made, and a note tells of it; without Redis nothing is said."""
    worker.register()
    monkeypatch.setattr(keys_cli, "_JOURNAL", tmp_path / "no journal")
    loaded = Loaded(settings_for(redis_server, api={"keys_dir": tmp_path / "keys"}), {})

    def add(name: str) -> tuple[str, list[str]]:
        arguments = ["add", name, "--models", "nosuch,digits", "--json"]
        done = CliRunner().invoke(keys_cli.key, arguments, obj=loaded, catch_exceptions=False)
        made = json.loads(done.stdout)
        return made["token"], [note for note in made["notes"] if "model" in note]

    token, notes = add("lab")
    assert token
    assert notes == ["the fleet knows no model 'nosuch' yet; known: digits"]
    redis_server.kill()
    token, notes = add("other")
    assert token
    assert notes == []


def test_pickles_are_not_opened(cli: Cli, tmp_path: Path) -> None:
    """An array of objects is a program; it is refused."""
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done = cli("submit", str(tmp_path / "evil.npy"))
    assert done.returncode == 65
    assert "is not a .npy file" in done.stderr


def test_waiting_for_results(cli: Cli, worker: HandWorker) -> None:
    """Printed in the order of the inputs; the exit code is that of the first failure."""

    def serve() -> None:
        ended = 0
        while ended < 2:
            for task in worker.claim(1):
                fails = decode(task.payload).body()[0][0] == [0]
                worker.finish(task, ShapeMismatch("must have 2", "inputs") if fails else {"label": "2"})
                ended += 1
            time.sleep(0.02)

    server = threading.Thread(target=serve)
    server.start()
    good, bad = cli.json("submit", "[1]", "[0]", "--wait", code=ShapeMismatch.exit_code)
    server.join()
    assert (good["status"], good["result"]) == ("completed", {"label": "2"})
    assert (bad["status"], bad["error"]["code"]) == ("failed", "shape_mismatch")


def test_waiting_in_vain(cli: Cli) -> None:
    """75 when the time is over, and the id is told all the same."""
    done = cli("submit", "[1]", "--wait", "--timeout", "0.3")
    assert done.returncode == 75
    assert done.stdout.split()[1] == "queued"


def test_result_of_a_task(cli: Cli, client: Client, worker: HandWorker) -> None:
    """Its state, then its result or error, as text and as JSON; 66 for an unknown id."""
    good, bad = client.submit([1]), client.submit([2])
    assert cli("result", good).stdout == "queued\n"
    assert cli("result", good, "--wait", "0.2").returncode == 75
    for task, outcome in zip(worker.claim(2), ({"label": "2"}, ShapeMismatch("no", "inputs")), strict=True):
        worker.finish(task, outcome)
    assert cli("result", good, "--wait", "60").stdout == '{"label":"2"}\n'
    assert cli.json("result", good)["result"] == {"label": "2"}
    done = cli("result", bad)
    assert (done.returncode, done.stdout) == (ShapeMismatch.exit_code, "")
    assert "inputs: no (shape_mismatch)" in done.stderr
    assert cli("result", "nobody").returncode == 66
    assert cli.json("result", "nobody", code=66)["error"]["code"] == "task_not_found"


def test_cancel(cli: Cli, client: Client, worker: HandWorker) -> None:
    """What waits or runs is cancelled; 1 when something had ended."""
    waiting, running, ended = (client.submit([number]) for number in range(3))
    _, second, third = worker.claim(3)
    worker.begin(second)
    worker.finish(third, 1)
    assert cli("cancel", waiting, running).returncode == 0
    done = cli("cancel", running, ended)
    assert done.returncode == 1
    assert f"{ended}: not cancelled: already completed" in done.stdout
    unknown = cli("cancel", "nobody")
    assert unknown.returncode == 66
    assert unknown.stdout == "nobody: unknown id; cancelled in case it arrives later\n"
    assert cli.json("cancel", running) == [{"task_id": running, "status": "revoked", "known": True}]


def test_without_redis(cli: Cli, redis_server: RedisServer) -> None:
    """69 and one line, for every command."""
    redis_server.kill()
    for arguments in (
        ("submit", "[1]"),
        ("result", "x"),
        ("cancel", "x"),
        ("queue", "status"),
        ("dead", "list"),
    ):
        done = cli(*arguments)
        assert done.returncode == 69, arguments
        assert "Redis does not answer" in done.stderr
        assert "; try: gpuinfer config show | grep broker.url # " in done.stderr
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_a_model_that_the_fleet_does_not_know(cli: Cli, worker: HandWorker) -> None:
    """Refused with 65 and the names it knows, one input or many or a batch; nothing is queued."""
    worker.register()
    for arguments in (("[1]",), ("[1]", "[2]"), ("--batch", "[[1], [2]]")):
        done = cli("submit", "--model", "digit", *arguments)
        assert done.returncode == UnknownModel.exit_code == 65
        assert "; known: digits" in done.stderr
        assert done.stdout == ""
    error = cli.json("submit", "--model", "digit", "[1]", code=65)["error"]
    assert (error["code"], error["field"]) == ("unknown_model", "model")
    assert worker.claim(10) == []


# -- queue --------------------------------------------------------------------------------


def test_queue_status(cli: Cli, client: Client, worker: HandWorker) -> None:
    """Waiting by queue, model and priority, in flight by worker, dead letters, and who serves what."""
    client.submit_many(range(3))
    client.submit_many(range(2), queue="batch", priority=9)
    client.submit([1], queue="batch", model="resnet")
    first, *_ = worker.claim(2)
    worker.begin(first)
    worker.beat()
    found = cli.json("queue", "status")
    digits, resnet = found.pop("models")
    (unserved,) = found.pop("unserved")
    assert found == {
        "queues": {
            "realtime": {
                "waiting": 1,
                "by_priority": {"0": 1},
                "by_model": {"digits": {"0": 1}},
                "later": {},
            },
            "default": {"waiting": 0, "by_priority": {}, "by_model": {}, "later": {}},
            "batch": {
                "waiting": 3,
                "by_priority": {"9": 2, "0": 1},
                "by_model": {"digits": {"9": 2}, "resnet": {"0": 1}},
                "later": {},
            },
        },
        "waiting": 4,
        "later": 0,
        "paused": [],
        "durability": {
            "appendfsync": "off",
            "means": "without an append-only file a restart of Redis loses the queue",
        },
        "foreign_keys": {},
        "in_flight": {WORKER: 2},
        "silent": {},
        "dead_letters": 0,
        "default_model": "digits",
    }
    assert (digits["name"], digits["default"], digits["serving"], digits["workers"]) == (
        "digits",
        True,
        True,
        1,
    )
    assert (resnet["name"], resnet["serving"], resnet["last_seen"]) == ("resnet", False, None)
    words = "1 task waits in batch for model resnet, which no live worker serves"
    assert unserved == {"queue": "batch", "model": "resnet", "waiting": 1, "message": words}
    text = cli("queue", "status").stdout
    assert f"in flight at {WORKER}: 2" in text
    assert re.search(r"(?m)^ *batch +digits +2 +0 +9: 2 *$", text), text
    assert re.search(r"(?m)^ *default +0 +0 *$", text), text
    assert re.search(r"(?m)^ *digits +yes +1 +realtime, default, batch +\d+ s ago *$", text), text
    assert re.search(r"(?m)^ *resnet +none +never *$", text), text
    assert words in text


def test_what_waits_where_nothing_serves(cli: Cli, redis_server: RedisServer, client: Client) -> None:
    """A worker that serves the model but not the queue does not help, and neither does a heartbeat of old."""
    with redis_server.client() as connection:
        worker = HandWorker(connection, "digits", "resnet")
        worker.store.serve(["realtime"])
        worker.beat()
        client.submit_many(range(12), queue="default", model="resnet")
        client.submit([1], model="resnet")
        said = "and no live worker of that model serves the queue default"
        (unserved,) = cli.json("queue", "status")["unserved"]
        assert unserved["message"] == f"12 tasks wait in default for model resnet, {said}"
        body = connection.get(keys.heartbeat(WORKER)) or b""
        connection.set(keys.heartbeat(WORKER), re.sub(rb'"at":\d+', b'"at":1000', body))
        assert [it["queue"] for it in cli.json("queue", "status")["unserved"]] == ["realtime", "default"]
        connection.delete(keys.DEFAULT_MODEL)
        connection.lpush("realtime", "{}")
        said = "1 task waits in realtime for the default model, and none is set"
        assert said in cli("queue", "status").stdout


def test_depth_of_known_workers(client: Client, worker: HandWorker) -> None:
    """Who knows the workers is spared the walk over all keys."""
    client.submit_many(range(3))
    worker.claim(2)
    found = depth.read(worker.store.client, workers=[WORKER, "gpu1@test"])
    assert (found.total_waiting, found.total_inflight, dict(found.inflight)) == (1, 2, {WORKER: 2})


def test_watching(cli: Cli) -> None:
    """One JSON line a look, until interrupted."""
    command = [sys.executable, "-m", "gpuinfer", "queue", "status", "--watch", "0.1", "--json"]
    with subprocess.Popen(command, env=cli.environment, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert [json.loads(watching.stdout.readline())["waiting"] for _ in range(3)] == [0, 0, 0]
        watching.terminate()


# -- dead letters -------------------------------------------------------------------------


def bury(worker: HandWorker, *, deaths: int = 2) -> str:
    """Have a worker die under what waits until it is a dead letter; return its id."""
    for _ in range(deaths):
        for task in worker.claim(1):
            worker.begin(task)
        restored = worker.store.restore()
    (letter_id,) = restored.dead
    return letter_id


def test_a_letter_is_listed_shown_and_sent_again(cli: Cli, client: Client, worker: HandWorker) -> None:
    """After a retry its deaths are forgotten: it may take down as many workers as a new task."""
    task_id = client.submit(["payload"], priority=3)
    assert bury(worker) == task_id
    (letter,) = cli.json("dead", "list")
    assert (letter["id"], letter["deaths"], letter["worker"]) == (task_id, 2, WORKER)
    assert (letter["queue"], letter["priority"], letter["task"]) == ("realtime", 3, "gpuinfer.predict")
    assert "payload" not in letter
    assert task_id in cli("dead", "list").stdout
    assert '\\"payload\\"' in cli("dead", "show", task_id).stdout
    assert "payload" in cli.json("dead", "show", task_id)
    with pytest.raises(DeadLettered):
        client.result(task_id, 1)

    assert cli.json("dead", "retry", task_id) == {"retried": [task_id], "refused": {}}
    assert client.status(task_id).state == "queued"
    assert cli.json("dead", "list") == []
    (task,) = worker.claim(10)
    envelope = decode(task.payload)
    assert (envelope.deliveries, envelope.deaths) == (0, 0)
    assert keys.place_of(task.list_key) == ("realtime", "", "", 3)
    worker.finish(task, "done")
    assert client.result(task_id, 5) == "done"
    assert cli("dead", "retry", task_id).returncode == TaskNotFound.exit_code


def test_retry_wakes_a_worker(client: Client, worker: HandWorker) -> None:
    """An idle one, as for a new task."""
    client.submit([1])
    task_id = bury(worker)
    assert worker.store.claim(1, state="idle") == []
    dead.retry(worker.store.client, task_id)
    assert worker.store.client.llen(keys.wake(WORKER)) == 1


def test_garbage_is_not_sent_again(cli: Cli, client: Client, worker: HandWorker) -> None:
    """Refused with what to do instead; the others go, the garbage stays."""
    worker.store.client.lpush("realtime", b"\xff garbage \x00")
    (task,) = worker.claim(10)
    garbage = worker.store.bury(task.seq, task.list_key, task.payload, DeadLettered("cannot be decoded"))
    good = client.submit([1])
    bury(worker)
    body = cli.json("dead", "retry", "--all", code=InputError.exit_code)
    assert body["retried"] == [good]
    assert list(body["refused"]) == [garbage]
    assert "gpuinfer dead drop" in body["refused"][garbage]["message"]
    assert [letter["id"] for letter in cli.json("dead", "list")] == [garbage]
    assert cli("dead", "show", garbage).returncode == 0


def test_drop(cli: Cli, client: Client, worker: HandWorker) -> None:
    """By id or all; the failure result stays; 66 when one was not there, 64 when nothing was said."""
    ids = []
    for number in range(3):
        client.submit([number])
        ids.append(bury(worker))
    assert cli.json("dead", "drop", ids[0]) == {"dropped": 1}
    assert cli("dead", "drop", ids[0]).returncode == 66
    assert cli("dead", "drop").returncode == 64
    assert cli("dead", "drop", ids[1], "--all").returncode == 64
    assert cli.json("dead", "drop", "--all") == {"dropped": 2}
    assert cli("dead", "list").stdout == "no dead letters\n"
    assert client.status(ids[0]).state == "failed"


def test_letters_of_somebody_else(worker: HandWorker) -> None:
    """What is in the hash and is no letter of ours is listed, not a crash, and cannot be sent again."""
    worker.store.client.hset(keys.DEAD, "x", "not json")
    worker.store.client.hset(keys.DEAD, "y", '{"id": "y"}')
    assert [letter.id for letter in dead.letters(worker.store.client)] == ["x", "y"]
    with pytest.raises(InputError):
        dead.retry(worker.store.client, "x")


def test_help_has_examples(cli: Cli) -> None:
    """Every command shows one."""
    for name in ("submit", "result", "cancel", "api"):
        assert "Example" in cli(name, "--help").stdout, name
    for name in ("list", "show", "retry", "drop"):
        assert "Example" in cli("dead", name, "--help").stdout, name
