# SPDX-License-Identifier: Apache-2.0
"""The real API over HTTP, on a real Redis; tasks are ended as a worker ends them."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from gpuinfer import Client
from gpuinfer.api import schemas
from gpuinfer.client.origin import reply_channel
from gpuinfer.errors import ShapeMismatch
from gpuinfer.queue import keys
from gpuinfer.queue.message import decode
from tests.apis import Api, HandWorker, submit
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


# -- a task's life ------------------------------------------------------------------------


def test_the_states_of_a_task(api: Api, worker: HandWorker) -> None:
    """202 with a place to look at; queued, running, completed."""
    response = api.http.post("/predict", json=schemas.DIGIT)
    task_id = response.json()["task_id"]
    assert response.status_code == 202
    assert response.headers["location"] == f"/result/{task_id}"
    assert api.http.get(f"/result/{task_id}").json() == {"task_id": task_id, "status": "queued"}
    (task,) = worker.claim()
    assert decode(task.payload).body()[0] == [schemas.DIGIT]
    worker.begin(task)
    assert api.http.get(f"/result/{task_id}").json()["status"] == "running"
    worker.finish(task, {"label": "2"})
    done = api.http.get(response.headers["location"]).json()
    assert done["status"] == "completed"
    assert done["result"] == {"label": "2"}


def test_a_failed_task_is_a_200(api: Api, worker: HandWorker) -> None:
    """The request for the result succeeded; its error has code, message and field."""
    task_id = submit(api)
    (task,) = worker.claim()
    worker.finish(task, ShapeMismatch("must have shape [1, 8, 8]", "inputs"))
    response = api.http.get(f"/result/{task_id}")
    assert response.status_code == 200
    assert response.json()["status"] == "failed"
    assert response.json()["error"] == {
        "code": "shape_mismatch",
        "message": "must have shape [1, 8, 8]",
        "field": "inputs",
    }


def test_options_reach_the_message(api: Api, worker: HandWorker) -> None:
    """Queue, priority, model, options, limits and expiry stand where a worker looks for them."""
    body = {
        "inputs": [schemas.DIGIT],
        "model": "digits",
        "queue": "default",
        "priority": 7,
        "top_k": 2,
        "encoding": "b64",
        "expires_s": 60,
        "soft_time_limit_s": 3,
        "time_limit_s": 4,
    }
    assert api.http.post("/batch_predict", json=body).status_code == 202
    (task,) = worker.claim()
    envelope = decode(task.payload)
    assert keys.place_of(task.list_key) == ("default", "digits", "", 7)
    assert envelope.task == "gpuinfer.batch_predict"
    assert envelope.body()[1] == {"model": "digits", "top_k": 2, "encoding": "b64"}
    assert envelope.headers["timelimit"] == [4, 3]
    assert envelope.headers["expires"]


def test_a_job_is_bounded_in_items(api: Api, worker: HandWorker) -> None:
    """413 that names the setting; nothing is queued."""
    worker.register()
    refused = api.http.post("/batch_predict", json={"inputs": [1] * 10_001})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["field"]) == (413, "payload_too_large", "inputs")
    assert "has 10001 items; queue.max_items is 10000" in error["message"]
    assert worker.claim() == []


def test_a_trace_is_passed_on(api: Api, worker: HandWorker) -> None:
    """A W3C traceparent is in the message, where OpenTelemetry looks; what is none counts as absent."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for sent, found in ((trace, trace), ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", None), ("x", None)):
        response = api.http.post("/predict", json=[1], headers={"traceparent": sent, "idempotency-key": sent})
        assert response.status_code == 202
        (task,) = worker.claim()
        assert decode(task.payload).headers.get("traceparent") == found
        again = api.http.post("/predict", json={"inputs": [1], "idempotency_key": sent})
        assert again.json() == response.json(), "another trace is no other request"


def test_the_same_key_gives_the_same_task(api: Api, worker: HandWorker) -> None:
    """A client that lost the answer may ask again: one task, by header or by field."""
    headers = {"Idempotency-Key": "order-66"}
    first = api.http.post("/predict", json=[1], headers=headers).json()
    again = api.http.post("/predict", json={"inputs": [1], "idempotency_key": "order-66"}).json()
    assert first == again
    other = api.http.post("/predict", json=[2], headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_conflict")
    assert len(worker.claim(10)) == 1


def test_cancelling(api: Api, worker: HandWorker) -> None:
    """What waits or runs is revoked, once and for all; what has ended is left alone."""
    waiting, running, ended = submit(api), submit(api), submit(api)
    first, second, third = worker.claim(3)
    worker.begin(second)
    worker.finish(third, "done")
    cancelled = api.http.post(f"/cancel/{waiting}").json()
    assert cancelled["cancelled"] is True
    assert cancelled["status"] == "revoked"
    assert cancelled["error"]["code"] == "revoked"
    assert api.http.post(f"/cancel/{waiting}").json() == cancelled
    worker.finish(first, "too late")
    assert api.http.get(f"/result/{waiting}").json()["status"] == "revoked"
    assert api.http.post(f"/cancel/{running}").json() == {**cancelled, "task_id": running}
    worker.finish(second, "too late")
    assert api.http.get(f"/result/{running}").json()["status"] == "revoked"
    assert api.http.post(f"/cancel/{ended}").json()["cancelled"] is False
    unknown = api.http.post("/cancel/nobody/known").json()
    assert unknown["task_id"] == "nobody/known"
    assert unknown["cancelled"] is True
    assert "it was unknown" in unknown["error"]["message"]
    assert api.http.post("/cancel/" + "x" * 5000).status_code == 422


def test_results_that_are_not_finite(api: Api, worker: HandWorker) -> None:
    """NaN in a result becomes null, also where a plain Celery worker wrote it; nothing crashes."""
    task_id = submit(api)
    worker.finish_all({"values": [1.0, math.nan, math.inf]})
    assert api.http.get(f"/result/{task_id}").json()["result"] == {"values": [1.0, None, None]}
    meta = b'{"status": "SUCCESS", "result": [NaN, 2], "task_id": "x"}'
    worker.store.client.set(keys.result("x"), meta)
    assert api.http.get("/result/x").json()["result"] == [None, 2]


def test_nan_is_accepted_for_the_worker_to_refuse(api: Api, worker: HandWorker) -> None:
    """The model's manifest says whether NaN is allowed; the API does not know it."""
    assert api.http.post("/predict", content=b'{"inputs": [NaN]}').status_code == 202
    (task,) = worker.claim()
    assert math.isnan(decode(task.payload).body()[0][0][0])


# -- waiting ------------------------------------------------------------------------------


def test_a_long_poll_ends_with_the_task(
    redis_server: RedisServer, worker: HandWorker, tmp_path: Path
) -> None:
    """The answer comes when the task ends, not when the time is over."""
    with Api(redis_server, tmp_path, api_max_wait_s=600) as api, ThreadPoolExecutor(1) as pool:
        task_id = submit(api)
        answer = pool.submit(httpx.get, f"{api.address}/result/{task_id}", params={"wait": 600}, timeout=120)
        wait_until(worker.store.client.pubsub_channels)
        worker.finish_all("done")
        assert answer.result().json()["result"] == "done"


def test_a_long_poll_ends_with_its_time(redis_server: RedisServer, tmp_path: Path) -> None:
    """It answers the state; ?wait is cut to api.max_wait_s."""
    with Api(redis_server, tmp_path, api_max_wait_s=0.3) as api:
        task_id = submit(api)
        began = time.monotonic()
        answer = api.http.get(f"/result/{task_id}", params={"wait": 600}).json()  # the caller's limit: 60 s
        assert answer["status"] == "queued"
        assert time.monotonic() - began > 0.25


def threads(pid: int) -> int:
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208  a count is all that is wanted


def test_200_long_polls_take_no_threads(
    redis_server: RedisServer, worker: HandWorker, client: Client, tmp_path: Path
) -> None:
    """200 callers wait at once; the process has a handful of threads, and all are answered.

    The tasks are another client's: the API hears of its own on one channel, so that nothing counts waiters.
    """
    ids = client.submit_many([schemas.DIGIT] * 200)
    channels = worker.store.client.pubsub_channels
    with Api(redis_server, tmp_path, api_max_wait_s=600) as api, ThreadPoolExecutor(200) as pool:
        before = threads(api.process.pid)

        def ask(task_id: str) -> str:
            response = httpx.get(f"{api.address}/result/{task_id}", params={"wait": 600}, timeout=200)
            return str(response.json()["status"])

        answers = [pool.submit(ask, task_id) for task_id in ids]
        wait_until(lambda: len(channels()) == 200)
        assert threads(api.process.pid) <= before + 2
        assert worker.finish_all("done") == 200
        assert {answer.result() for answer in answers} == {"completed"}
        wait_until(lambda: not channels())  # nobody listens any more


def test_long_polls_share_one_channel(api: Api, worker: HandWorker) -> None:
    """The API hears of the ends of its own tasks on one channel; callers of all of them are answered."""
    ids = [submit(api) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = [
            pool.submit(httpx.get, f"{api.address}/result/{task_id}", params={"wait": 60}, timeout=90)
            for task_id in ids
        ]
        wait_until(worker.store.client.pubsub_channels)
        assert worker.store.client.pubsub_channels() == [reply_channel(ids[0]).encode()]
        assert worker.finish_all("done") == 20
        assert {answer.result().json()["status"] for answer in answers} == {"completed"}


def test_a_caller_that_leaves_is_forgotten(
    redis_server: RedisServer, worker: HandWorker, client: Client, tmp_path: Path
) -> None:
    """A long-poll whose client has gone does not wait on for a minute."""
    task_id = client.submit(schemas.DIGIT)
    with Api(redis_server, tmp_path, api_max_wait_s=600) as api:
        host, port = api.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as caller:
            request = f"GET /result/{task_id}?wait=600 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            caller.sendall(request.encode())
            wait_until(worker.store.client.pubsub_channels)
        wait_until(lambda: not worker.store.client.pubsub_channels())


# -- what is refused ----------------------------------------------------------------------


BODIES: tuple[tuple[bytes, int, str, str | None], ...] = (
    (b'{"inputs": [1], "prioritaet": 3}', 422, "bad_input", "prioritaet"),
    (b'{"inputs": [1], "priority": 11}', 422, "bad_input", "priority"),
    (b'{"inputs": [1], "queue": "fast"}', 422, "bad_input", "queue"),
    (b'{"inputs": [1], "expires_s": 1e300}', 422, "bad_input", "expires_s"),
    (b'{"model": "digits"}', 422, "bad_input", "inputs"),
    (b"[1, 2", 400, "malformed_json", "body"),
    (b"", 400, "malformed_json", "body"),
    (b"[" * 50_000, 400, "malformed_json", "body"),
    (b"[" + b"1" * 2000 + b"]", 400, "malformed_json", "body"),
    (b"[NaN, 1" + b"0" * 5000 + b"]", 400, "malformed_json", "body"),
    (b'{"inputs": [NaN], "top_k": 100000000000000000000000000}', 422, "bad_input", "top_k"),
    (b'{"inputs": [NaN], "model": "\\ud83d"}', 422, "bad_input", "model"),
    (b'{"inputs": [NaN], "idempotency_key": "\\ud83d"}', 422, "bad_input", "idempotency_key"),
    (b'{"inputs": {"\\ud83d": NaN}}', 422, "bad_input", "inputs"),
)


def test_bad_bodies(api: Api) -> None:
    """Every error has one shape, and says which field was wrong."""
    for content, status, code, field in BODIES:
        response = api.http.post("/predict", content=content)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error.get("field")) == (status, code, field), content[
            :80
        ]
        assert error["message"]


def test_a_foreign_value_under_a_results_key(api: Api, worker: HandWorker) -> None:
    """What another program keeps there stays, and is a 409 that says so; half pairs are spelt out."""
    redis = worker.store.client
    redis.lpush(keys.result("list"), "x")
    for name, value in (("text", b"hello"), ("number", b"5"), ("deep", b"[" * 100_000)):
        redis.set(keys.result(name), value)
    for task_id in ("list", "text", "number", "deep"):
        for response in (
            api.http.get(f"/result/{task_id}"),
            api.http.get(f"/result/{task_id}?wait=0.2"),
            api.http.post(f"/cancel/{task_id}"),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["field"]) == (
                409,
                "unreadable_result",
                "task_id",
            )
    redis.set(keys.result("half"), b'{"status": "SUCCESS", "result": "\\ud83d"}')
    assert api.http.get("/result/half").json()["result"] == "\\ud83d"


def test_manners(api: Api, worker: HandWorker) -> None:
    """HEAD and OPTIONS where GET is; a closing slash is served, not redirected; bodies end with a newline."""
    worker.beat()
    assert api.http.post("/predict/", content=b"\xef\xbb\xbf[1]").status_code == 202
    for path in (
        "/health/ready",
        "/health/live",
        "/models",
        "/docs",
        "/openapi.json",
        "/result/x",
        "/nowhere",
    ):
        get, head = api.http.get(path), api.http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-length"] == get.headers["content-length"]
        assert get.content.endswith(b"\n")
        assert api.http.get(path + "/").content == get.content
        options = api.http.options(path)
        if path == "/nowhere":
            assert options.status_code == 404
        else:
            assert options.content == b""
            assert (options.status_code, options.headers["allow"]) == (200, "GET, HEAD, OPTIONS")
    assert api.http.options("/predict").headers["allow"] == "OPTIONS, POST"


PATHS = (
    ("/result/6b1f3d0e-2c55-4c39-9f0a-8f4f5a1c7d21", 404, "task_not_found"),
    ("/result/%00%ff..", 404, "task_not_found"),
    ("/result/" + "x" * 200, 404, "task_not_found"),
    ("/result/" + "x" * 201, 422, "bad_input"),
    ("/result/" + "x" * 5000, 422, "bad_input"),
    ("/result/x?wait=0.2", 404, "task_not_found"),
    ("/result/x?wait=nan", 422, "bad_input"),
    ("/result/x?wait=-1", 422, "bad_input"),
    ("/nothing", 404, "not_found"),
    ("/", 404, "not_found"),
    ("/predict", 405, "method_not_allowed"),
)


def test_bad_paths(api: Api) -> None:
    """Unknown ids, bad waits, wrong paths and methods have the same shape of error."""
    for path, status, code in PATHS:
        response = api.http.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), path[:80]


def test_too_large_with_a_length(api: Api) -> None:
    """413 before the body is read, with the limit."""
    response = api.http.post("/predict", content=b" " * 40_000_000)
    assert response.status_code == 413
    assert "33554432" in response.json()["error"]["message"]
    assert api.http.get("/health/live").status_code == 200


def test_too_large_in_chunks(api: Api) -> None:
    """413 though no length was announced; the process keeps no more than the limit."""
    before = resident_kib(api.process.pid)

    def chunks() -> Iterator[bytes]:
        for _ in range(60):
            yield b"1," * 500_000

    response = api.http.post("/predict", content=chunks())
    assert response.status_code == 413
    assert resident_kib(api.process.pid) - before < 60_000
    assert api.http.get("/health/live").status_code == 200


def test_bodies_that_stall_neither_starve_nor_grow_the_front(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """200 clients announce 4 MiB, send most of it and stall: small and large requests of others get in, and
    no more is held than may be; each that stalls is refused in the end."""
    with Api(redis_server, tmp_path, api_max_held_mb=32, api_body_stall_s=4) as api, ExitStack() as stack:
        before = resident_kib(api.process.pid)
        host, port = api.address.removeprefix("http://").split(":")
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {4 * 2**20}\r\n\r\n["
        clients = [stack.enter_context(socket.create_connection((host, int(port)), 60)) for _ in range(200)]
        for client in clients:
            client.sendall(head.encode())
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.send(b"1," * 1_900_000)
        assert submit(api)
        content = b"[" + b"1," * 2_000_000 + b"1]"
        while (large := api.http.post("/predict", content=content)).status_code == 408:
            pass  # this process has stood still for api.body_stall_s itself
        assert large.status_code == 202, large.text
        assert resident_kib(api.process.pid) - before < 150_000
        for client in clients:
            client.settimeout(60)
            answer = client.recv(4096)
            assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 ")), answer
        assert api.http.get("/health/live").status_code == 200


def test_heads_are_bounded(api: Api) -> None:
    """One that does not end is refused once it is too large; what is no HTTP is a 400 in the usual form."""
    host, port = api.address.removeprefix("http://").split(":")
    for sent, status, code in (
        (b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000, b"431", b"head_too_large"),
        (b"hello\r\n\r\n", b"400", b"malformed_request"),
    ):
        with socket.create_connection((host, int(port)), 60) as client:
            client.sendall(sent)
            answer = b"".join(iter(lambda: client.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert code in answer


def test_as_many_requests_as_may_be(redis_server: RedisServer, tmp_path: Path) -> None:
    """One more is a 503 with Retry-After; health is answered all the same. An idle connection is closed."""
    with Api(redis_server, tmp_path, api_max_requests=1, api_keep_alive_s=1) as api:
        task_id = submit(api)

        def wait() -> httpx.Response:
            """Ask until it is the request below that comes too late."""
            while (
                answer := httpx.get(f"{api.address}/result/{task_id}?wait=50", timeout=60)
            ).status_code == 503:
                pass
            return answer

        with ThreadPoolExecutor(1) as pool, redis_server.client() as client:
            waiting = pool.submit(wait)
            # Each on a connection of its own: an idle one may be closed as a request is on its way.
            wait_until(lambda: httpx.get(f"{api.address}/models", timeout=60).status_code == 503)
            busy = httpx.get(f"{api.address}/models", timeout=60)
            assert busy.status_code == 503
            assert busy.json()["error"]["code"] == "front_busy"
            assert int(busy.headers["retry-after"]) >= 1
            assert httpx.get(f"{api.address}/health/live", timeout=60).status_code == 200
            HandWorker(client).finish_all("done")
            assert waiting.result().json()["result"] == "done"
        host, port = api.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as idle:
            idle.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b"".join(iter(lambda: idle.recv(4096), b""))  # until api.keep_alive_s is over
            assert answer.startswith(b"HTTP/1.1 200")


def resident_kib(pid: int) -> int:
    """Return a process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def test_the_largest_message_is_accepted(redis_server: RedisServer, tmp_path: Path) -> None:
    """queue.max_payload_bytes counts the message; just under it is 202, just over it 413."""
    with Api(redis_server, tmp_path, queue_max_payload_bytes=10_000) as api:
        assert api.http.post("/predict", content=b"[" + b"1," * 4000 + b"1]").status_code == 202
        response = api.http.post("/predict", content=b"[" + b"1," * 5500 + b"1]")
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"


def test_a_compressed_body_that_is_cut_off_is_refused(api: Api) -> None:
    """Said in words, not as JSON that is broken at its first byte."""
    response = api.http.post("/predict", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 400
    assert "its gzip data has no end" in response.json()["error"]["message"]
