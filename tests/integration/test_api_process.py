# SPDX-License-Identifier: Apache-2.0
"""The API as a process: Redis away, full or hanging; sockets, signals, restarts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gpuinfer import Client
from gpuinfer.api.server import GOODBYE_S
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.work import ready
from gpuinfer.settings import Loaded, Settings
from tests.apis import Api, HandWorker, delays, submit
from tests.conftest import RedisFactory
from tests.services import Process, RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


# -- Redis is away, or full ---------------------------------------------------------------


def test_without_redis_503_and_back_by_itself(redis_server: RedisServer, tmp_path: Path) -> None:
    """503 with Retry-After while Redis is dead, 202 as soon as it is back; the process is the same."""
    with Api(redis_server, tmp_path, api_retry_after_s=7) as api:
        submit(api)
        redis_server.kill()
        for method, path in (
            ("POST", "/predict"),
            ("GET", "/result/x"),
            ("POST", "/cancel/x"),
            ("GET", "/health/ready"),
        ):
            response = api.http.request(method, path, content=b"[1]")
            assert response.status_code == 503
            assert response.headers["retry-after"] == "7"
            assert response.json()["error"]["code"] == "broker_unavailable"
        assert api.http.get("/health/live").status_code == 200
        redis_server.start()
        task_id = submit(api)
        assert api.http.get(f"/result/{task_id}").json()["status"] == "queued"
        nobody = api.http.get("/health/ready")
        assert (nobody.status_code, nobody.json()["error"]["code"]) == (503, "not_ready")
        with redis_server.client() as client:
            HandWorker(client).beat()
        assert api.http.get("/health/ready").json() == {"status": "ok", "workers": 1, "startable": 0}


def test_it_starts_without_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    """The order of starting does not matter."""
    redis_server.kill()
    with Api(redis_server, tmp_path) as api:
        assert api.http.post("/predict", json=[1]).status_code == 503
        redis_server.start()
        submit(api)


def test_a_long_poll_spans_a_restart_of_redis(
    redis_factory: RedisFactory, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    """Callers that wait while Redis dies and comes back get their results, not errors."""
    server = redis_factory(appendonly="yes", appendfsync="always")
    with Api(server, tmp_path) as api, ThreadPoolExecutor(10) as pool:
        # Another client's, of whose ends the API hears one by one: their channels tell that it waits.
        with Client(settings_for(server)) as other:
            ids = other.submit_many([[1]] * 10)
        answers = [
            pool.submit(
                lambda task_id: httpx.get(f"{api.address}/result/{task_id}?wait=60", timeout=90), task_id
            )
            for task_id in ids
        ]
        with server.client() as client:
            wait_until(lambda: len(client.pubsub_channels()) == 10, 60)
            # Each looks when it comes, and when its channel stands; an unanswered first look is a 503.
            wait_until(lambda: client.info("commandstats").get("cmdstat_mget", {}).get("calls", 0) >= 20, 60)
        server.kill()
        time.sleep(0.5)
        server.start()
        with server.client() as client:
            assert HandWorker(client).finish_all("done") == 10
        for answer in answers:
            assert answer.result().json().get("result") == "done", answer.result().text


def test_a_full_redis_refuses_and_workers_go_on(redis_factory: RedisFactory, tmp_path: Path) -> None:
    """429 queue_full with Retry-After; what was accepted is still ended, and then there is room."""
    server = redis_factory(maxmemory="4mb", maxmemory_policy="volatile-ttl")
    with Api(server, tmp_path) as api, server.client() as client:
        worker, accepted, inputs = HandWorker(client), [], ["x" * 100_000]
        while (response := api.http.post("/predict", json=inputs)).status_code == 202:
            accepted.append(response.json()["task_id"])
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) > 0
        assert worker.finish_all("done") == len(accepted)
        assert api.http.get(f"/result/{accepted[-1]}").json()["result"] == "done"
        submit(api)


# -- the process --------------------------------------------------------------------------


def test_docs_have_real_examples(api: Api) -> None:
    """/docs is there, and its first example can be sent as it stands."""
    page = api.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/predict" in page.text
    spec = api.http.get("/openapi.json").json()
    for path in ("/predict", "/batch_predict"):
        body = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in body["examples"].values():
            assert api.http.post(path, json=example["value"]).status_code == 202
    assert "HTTPValidationError" not in str(spec)


def test_every_request_is_logged_once_without_its_payload(
    redis_server: RedisServer, worker: HandWorker, tmp_path: Path
) -> None:
    """With log.requests = "all": method, path, status, duration, task id, what was done; not what was sent.

    A request that names no model is logged with the fleet's default model.
    """
    worker.register()
    with Api(redis_server, tmp_path, log_requests="all") as api:
        _every_request_is_logged(api)


def _every_request_is_logged(api: Api) -> None:
    task_id = submit(api, ["secret-payload"])
    api.http.get("/result/nobody")
    api.http.post("/predict", content=b'"secret-payload"')
    api.http.post(f"/cancel/{task_id}")
    wait_until(lambda: api.log("task_cancelled"))  # a line is written once the answer is on its way
    (line,) = api.log("task_accepted")
    assert (line["path"], line["status"], line["task_id"]) == ("/predict", 202, task_id)
    assert (line["queue"], line["model"], line["priority"]) == ("realtime", "digits", 0)
    assert line["duration_ms"] > 0
    told = [(line["path"], line["status"], line["code"], line["level"]) for line in api.log("request")]
    assert told == [("/result/nobody", 404, "task_not_found", "info"), ("/predict", 422, "bad_input", "info")]
    (line,) = api.log("task_cancelled")
    assert line["task_id"] == task_id
    assert "secret-payload" not in api.process.text()


def test_requests_that_succeed_are_counted(api: Api, worker: HandWorker) -> None:
    """By default they are a line a minute, or at the end; a client's mistake has a line, and no warning."""
    worker.register()
    task_id = submit(api)
    submit(api)
    api.http.get(f"/result/{task_id}")
    api.http.post("/predict", content=b'"no tensor"')
    api.process.send(signal.SIGTERM)
    assert api.process.wait() == 0
    assert api.log("task_accepted") == []
    (line,) = api.log("request")
    assert (line["status"], line["level"]) == (422, "info")
    (line,) = api.log("requests")
    assert (line["succeeded"], line["accepted"], line["mistakes"]) == (3, 2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(redis_server: RedisServer, tmp_path: Path, number: signal.Signals) -> None:
    """Waiting callers are told the state at once; the exit status is 0."""
    with (
        Api(redis_server, tmp_path, api_max_wait_s=600) as api,
        ThreadPoolExecutor(1) as pool,
        redis_server.client() as client,
    ):
        task_id = submit(api)
        waiting = pool.submit(httpx.get, f"{api.address}/result/{task_id}?wait=600", timeout=120)
        wait_until(client.pubsub_channels)
        api.process.send(number)
        assert waiting.result().json()["status"] == "queued"
        assert api.process.wait() == 0


def call(address: str, outcomes: list[int | str], over: threading.Event) -> None:
    """Ask again and again on a connection that is kept; note each status, or what went wrong.

    A caller that stands still with an idle connection may find it closed just as it sends: what HTTP allows,
    and what no server can help. It asks again.
    """
    with httpx.Client(base_url=address, timeout=60) as http:
        answered = sent = time.monotonic()

        def note(step: str, _: object) -> None:
            nonlocal sent
            if step.startswith("http11.send_request"):
                sent = time.monotonic()

        while not over.is_set():
            try:
                outcomes.append(http.post("/predict", json=[1], extensions={"trace": note}).status_code)
            except httpx.HTTPError as exc:
                if sent - answered < GOODBYE_S:
                    outcomes.append(repr(exc))
            answered = time.monotonic()


def test_a_restart_loses_no_request(redis_server: RedisServer, tmp_path: Path) -> None:
    """On an inherited socket, clients that keep connections see no error while the process changes.

    Nor does an answer wait 40 ms for the acknowledgement of its first packet: TCP_NODELAY is set there, too.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        port = listener.getsockname()[1]
        outcomes: list[int | str] = []
        over = threading.Event()
        command = [sys.executable, "-m", "gpuinfer", "api", "--fd", str(listener.fileno())]
        environment = os.environ | {"GPUINFER_BROKER_URL": redis_server.url}
        asking = (f"http://127.0.0.1:{port}", outcomes, over)
        callers = [threading.Thread(target=call, args=asking) for _ in range(4)]
        for caller in callers:
            caller.start()
        for _ in range(2):
            with subprocess.Popen(
                command, close_fds=False, env=environment, stderr=subprocess.DEVNULL
            ) as api:
                answered = len(outcomes)
                wait_until(lambda answered=answered: len(outcomes) > answered + 200, 60)  # type: ignore[misc]
                delayed = delays(api.pid, port)
                assert delayed
                assert not any(delayed)
                api.send_signal(signal.SIGTERM)
                assert api.wait(60) == 0
        with subprocess.Popen(command, close_fds=False, env=environment, stderr=subprocess.DEVNULL) as api:
            over.set()
            for caller in callers:
                caller.join()
            api.terminate()
        assert set(outcomes) == {202}, [it for it in outcomes if it != 202][:5]


def replace(file: Path, text: str) -> None:
    """Write a file at once: ``write_text`` empties it before."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


def test_wrong_settings_are_a_503_that_names_them(redis_server: RedisServer, tmp_path: Path) -> None:
    """A front that was handed its socket tells this host alone what is wrong, and serves once it is right."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text("[api\n")
    arguments = ["--config", str(file), "api", "--fd"]
    environment = os.environ | {"GPUINFER_BROKER_URL": redis_server.url}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.set_inheritable(True)
        command = [sys.executable, "-m", "gpuinfer", *arguments, str(listener.fileno())]
        api = Process(command, tmp_path / "api.log", env=environment, pass_fds=(listener.fileno(),))
        try:
            with httpx.Client(base_url=address, timeout=60) as http:
                refused = http.post("/predict", content=b"[1]" * 1_000_000)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
                assert refused.text.endswith("}}\n")
                error = refused.json()["error"]
                assert (error["code"], error["field"]) == ("bad_config", str(file))
                assert "is not valid TOML" in error["message"]
                assert http.head("/").status_code == 503
                passed_on = http.get("/health/ready", headers={"X-Forwarded-For": "192.0.2.7"})
                assert passed_on.json()["error"]["code"] == "not_ready"
                assert str(tmp_path) not in passed_on.text
                replace(file, f'[api]\ntls_cert = "{tmp_path}/none.pem"\n')
                wait_until(lambda: "none.pem" in http.get("/models").text, 60)
                section = {"port": listener.getsockname()[1], "tls_cert": f"{tmp_path}/none.pem"}
                found = ready(Host(Loaded(Settings.model_validate({"api": section}), {}), root=tmp_path))
                assert "answers without TLS, though api.tls_cert is set: " in found.message
                assert (f"{tmp_path}/none.pem" in found.message, found.remedy) == (
                    True,
                    "gpuinfer config check",
                )
                replace(file, "[api]\n")
                wait_until(lambda: http.get("/health/live").status_code == 200, 60)
            assert api.terminate() == 0
            assert [line for line in api.lines() if "settings_wrong" in line][2:] == []
        finally:
            api.kill()


def test_wrong_settings_and_a_stop(tmp_path: Path) -> None:
    """SIGTERM ends a front with wrong settings as it ends others: with 0."""
    environment = os.environ | {"GPUINFER_API_NOSUCH": "1"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        command = [sys.executable, "-m", "gpuinfer", "api", "--fd", str(listener.fileno())]
        api = Process(command, tmp_path / "api.log", env=environment, pass_fds=(listener.fileno(),))
        try:
            api.wait_for_line("GPUINFER_API_NOSUCH")
            assert api.terminate() == 0
        finally:
            api.kill()


def test_a_unix_socket(redis_server: RedisServer, tmp_path: Path) -> None:
    """--socket listens there, takes a dead one's place, and removes it in the end."""
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Api(redis_server, tmp_path, "--socket", str(path)) as api:
        submit(api)
        assert path.stat().st_mode & 0o777 == 0o660
        assert api.process.terminate() == 0
    assert not path.exists()


def run(server: RedisServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that is expected to end by itself."""
    command = [sys.executable, "-m", "gpuinfer", "api", *arguments]
    environment = os.environ | {"GPUINFER_BROKER_URL": server.url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_where_it_cannot_listen(api: Api, redis_server: RedisServer, tmp_path: Path) -> None:
    """A port in use, a foreign address, a closed descriptor, a file: each said clearly, exit code 69."""
    (tmp_path / "file").write_text("precious")
    port = api.address.rpartition(":")[2]
    for arguments, words in (
        (("--port", port), "Address already in use"),
        (("--host", "203.0.113.7"), "Cannot assign requested address"),
        (("--fd", "99"), "Bad file descriptor"),
        (("--socket", str(tmp_path / "file")), "Address already in use"),
    ):
        done = run(redis_server, *arguments)
        assert done.returncode == 69, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "precious"
    assert run(redis_server, "--fd", "3", "--port", "0").returncode == 64


def test_it_knows_no_torch_and_no_celery() -> None:
    """The front starts quickly and stays small."""
    code = (
        "import sys, gpuinfer.api.app, gpuinfer.api.server, gpuinfer.api.cli; "
        "print([m for m in ('torch', 'celery', 'kombu', 'numpy', 'gpuinfer.worker') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_readiness_is_told_to_systemd(redis_server: RedisServer, tmp_path: Path) -> None:
    """READY=1 comes when it listens, STOPPING=1 when it stops."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(60)
        command = [sys.executable, "-m", "gpuinfer", "api", "--port", "0"]
        environment = os.environ | {"GPUINFER_BROKER_URL": redis_server.url, "NOTIFY_SOCKET": str(path)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as api:
            assert notify.recv(1000).startswith(b"READY=1")
            api.terminate()
            assert notify.recv(1000) == b"STOPPING=1"
            assert api.wait(60) == 0


def test_a_redis_that_hangs_is_503(redis_server: RedisServer, tmp_path: Path) -> None:
    """A Redis that takes connections and says nothing ends in 503, not in callers that wait for ever."""
    with Api(redis_server, tmp_path, broker_connect_timeout_s=0.5) as api:

        def accepted() -> bool:
            """Whatever else keeps Redis from an answer for half a second is a 503, too."""
            return api.http.post("/predict", json=[1]).status_code == 202

        wait_until(accepted)
        redis_server.process.send(signal.SIGSTOP)
        try:
            assert api.http.post("/predict", json=[1]).status_code == 503
        finally:
            redis_server.process.send(signal.SIGCONT)
        wait_until(accepted)


def test_redis_errors_are_typed(redis_factory: RedisFactory, tmp_path: Path) -> None:
    """A wrong password is said to be one."""
    server = redis_factory()
    with server.client() as client:
        client.execute_command("CONFIG", "SET", "requirepass", "right")
    with Api(server, tmp_path, broker_password="wrong") as api:
        response = api.http.post("/predict", json=[1])
        assert response.status_code == 503
        assert "password" in response.json()["error"]["message"]
