# SPDX-License-Identifier: Apache-2.0
"""Who is let in, by role, by what is asked and by how the request came: the whole front on a real Redis."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.types import Receive, Scope, Send

from gpuinfer.api.front import Front
from gpuinfer.errors import InferenceError
from gpuinfer.keys.key import Key, digest, serialise
from gpuinfer.queue.keys import WEIGHTS
from gpuinfer.settings import Settings
from tests.apis import WORKER, HandWorker
from tests.services import RedisServer

pytestmark = pytest.mark.integration

#: How a request comes -> its client and server addresses as uvicorn has them.
TRANSPORTS: Mapping[str, tuple[tuple[str, int] | None, tuple[str, int | None]]] = {
    "unix": (None, ("/run/gpuinfer/api.sock", None)),
    "loopback": (("127.0.0.1", 50000), ("127.0.0.1", 8080)),
    "anonymous": (("10.1.2.3", 50000), ("10.0.0.1", 8080)),
    "network": (("192.0.2.7", 50000), ("192.0.2.1", 8080)),
}
#: What a request shows -> its token.
TOKENS = {"predict": "gpi_predict", "read": "gpi_read", "admin": "gpi_admin"}
DIGIT = {"inputs": [1], "model": "digits"}


class Site:
    """The whole front in this process, on a real Redis, with a folder of keys; ask it by any transport."""

    def __init__(self, front: Front, folder: Path) -> None:
        self.front = front
        self.folder = folder

    def put(self, name: str, token: str, **fields: Any) -> None:
        """Write a key, as it counts after the next look, which is now."""
        (self.folder / f"{name}.toml").write_text(serialise(Key(name=name, sha256=digest(token), **fields)))
        self.front.shared.keys.refresh()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        by: str = "network",
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
    ) -> httpx.Response:
        """Send one request."""
        client, server = TRANSPORTS[by]

        async def arrived(scope: Scope, receive: Receive, send: Send) -> None:
            await self.front({**scope, "client": client, "server": server}, receive, send)

        given = dict(headers or {}) | ({"authorization": f"Bearer {token}"} if token else {})
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(arrived), base_url="http://localhost"
        ) as http:
            return await http.request(method, path, headers=given, json=json)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Site]:
    """A front that serves."""
    front = Front(settings)
    async with front._app.router.lifespan_context(front._app):
        yield Site(front, settings.api.keys_dir)


@pytest.fixture
def keyed(redis_server: RedisServer, settings_for: Callable[..., Settings], tmp_path: Path) -> Settings:
    """Settings with an empty folder of keys."""
    folder = tmp_path / "keys.d"
    folder.mkdir()
    found = settings_for(redis_server)
    update = {"keys_dir": folder, "anonymous": ("10.0.0.0/8",)}
    return found.model_copy(update={"api": found.api.model_copy(update=update)})


#: Verb -> a request of it, and its status where it is let in.
REQUESTS: Mapping[str, tuple[str, str, Any, int]] = {
    "health": ("GET", "/health/live", None, 200),
    "look": ("GET", "/queues", None, 200),
    "docs": ("GET", "/openapi.json", None, 200),
    "options": ("OPTIONS", "/predict", None, 200),
    "oip": ("GET", "/v2", None, 200),
    "submit": ("POST", "/predict", DIGIT, 202),
    "change": ("POST", "/tasks/nobody/cancel", None, 404),
    "manage": ("POST", "/v2/repository/models/nosuch/unload", None, 404),
}
#: Who -> the verbs that are let in, beside health; the rest of them is a 403.
MAY = {
    "read": {"look", "docs", "options", "oip"},
    "predict": {"look", "docs", "options", "oip", "submit", "change"},
    "admin": set(REQUESTS),
}


def expected(who: str, by: str, verb: str, *, keys: bool) -> int:
    """Return the status of a request, as the issue has it: written apart from the code that decides."""
    if verb == "health":
        return REQUESTS[verb][3]
    role: str | None = who if who in MAY else None
    if who == "bogus":
        role = None
    elif role is None and by == "anonymous":
        role = "predict"
    elif role is None and (by == "unix" or (by == "loopback" and not keys)):
        role = "admin"
    if role is None:
        return 401
    return REQUESTS[verb][3] if verb in MAY[role] else 403


async def test_the_matrix(keyed: Settings) -> None:
    """Role x verb x transport, with keys in use and without any; expired and unknown tokens."""
    async with opened(keyed) as site:
        wrong = []
        for keys in (False, True):
            if keys:
                for role, its_token in TOKENS.items():
                    site.put(role, its_token, role=role)
                site.put("old", "gpi_old", role="admin", expires=1.0)
            whos = ("none", "bogus", *(TOKENS if keys else ()), *(("old",) if keys else ()))
            for who, by, verb in itertools.product(whos, TRANSPORTS, REQUESTS):
                method, path, body, _ = REQUESTS[verb]
                token: str | None = None if who == "none" else f"gpi_{who}"
                answer = await site.ask(method, path, by=by, token=token, json=body)
                wanted = expected("bogus" if who == "old" else who, by, verb, keys=keys)
                if answer.status_code != wanted:
                    wrong.append((keys, who, by, verb, answer.status_code, wanted, answer.text))
        assert wrong == []


async def test_what_a_refusal_says(keyed: Settings) -> None:
    """How a key is made while there is none; the challenge of RFC 6750; the protocol's own form of errors."""
    async with opened(keyed) as site:
        first = await site.ask("GET", "/queues")
        assert first.json()["error"]["code"] == "unauthorized"
        assert "gpuinfer key add NAME" in first.json()["error"]["message"]
        assert first.headers["www-authenticate"] == 'Bearer realm="gpuinfer"'
        site.put("shop", "gpi_x", role="read")
        site.put("old", "gpi_old", expires=1.0)
        none = await site.ask("GET", "/queues", by="loopback")
        assert "gpuinfer key add" not in none.json()["error"]["message"]
        unknown = await site.ask("GET", "/queues", token="gpi_y")
        assert unknown.json()["error"]["message"] == "this key is unknown or was revoked"
        assert unknown.headers["www-authenticate"] == 'Bearer realm="gpuinfer", error="invalid_token"'
        old = await site.ask("GET", "/queues", token="gpi_old")
        assert old.json()["error"]["message"] == "this key has expired"
        role = await site.ask("POST", "/predict", token="gpi_x", json=DIGIT)
        assert role.json()["error"] == {
            "code": "forbidden",
            "message": "POST /predict needs a key with the role predict or admin, "
            "and the key shop has the role read",
        }
        protocol = await site.ask("GET", "/v2")
        assert protocol.status_code == 401
        assert protocol.json() == {"error": protocol.json()["error"]}
        assert protocol.headers["www-authenticate"] == 'Bearer realm="gpuinfer"'


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "bearer gpi_x"}, 200),
        ({"authorization": "BEARER   gpi_x "}, 200),
        ({"x-api-key": "gpi_x"}, 200),
        ({"X-API-Key": " gpi_x "}, 200),
        ({"authorization": "Basic Zzp4", "x-api-key": "gpi_x"}, 200),
        ({"authorization": "Bearer gpi_x", "x-api-key": "gpi_y"}, 200),
        ({"authorization": "Bearer gpi_y", "x-api-key": "gpi_x"}, 401),
        ({"authorization": "Basic Zzp4"}, 401),
        ({"authorization": "gpi_x"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer gpi_X"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "gpi_x\xff"}, 401),
    ],
)
async def test_how_a_key_is_shown(keyed: Settings, headers: dict[str, str], status: int) -> None:
    """As a bearer token, or as X-API-Key; the first of them where both are there."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_x")
        encoded: Any = {name: value.encode("latin-1") for name, value in headers.items()}
        assert (await site.ask("GET", "/queues", headers=encoded)).status_code == status


async def test_health_tells_nobody_more_than_how_it_is(keyed: Settings) -> None:
    """Neither why, nor which models there are; who has a key is told."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_x", role="read")
        for path in ("/health/ready", "/health/ready?model=nosuch", "/v2/health/ready"):
            bare = await site.ask("GET", path)
            assert bare.status_code == 503
            assert "no worker is alive, and none may be started" in bare.text
        known = await site.ask("GET", "/health/ready", token="gpi_x")
        assert "run gpuinfer doctor" in known.text


async def test_without_redis_nothing_of_the_host_is_told(keyed: Settings, redis_server: RedisServer) -> None:
    """Where Redis is says the log, and the administrator's answer."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_x")
        site.put("boss", "gpi_b", role="admin")
        redis_server.stop()
        told = await site.ask("GET", "/queues", token="gpi_x")
        assert (told.status_code, told.json()["error"]["message"]) == (
            503,
            "the queue is unavailable; see this server's log",
        )
        admin = await site.ask("GET", "/queues", token="gpi_b")
        assert admin.json()["error"]["message"] != told.json()["error"]["message"]


# -- whose tasks they are -----------------------------------------------------------------------

#: Who asks -> how: "key" or the transport of one without.
ASKERS: Mapping[str, tuple[str, str | None]] = {
    "shop": ("network", "gpi_shop"),
    "lab": ("network", "gpi_lab"),
    "read": ("network", "gpi_read"),
    "boss": ("network", "gpi_boss"),
    "anonymous": ("anonymous", None),
    "unix": ("unix", None),
}
#: What is asked of a task, and its status for who may: of a completed one, and of one that waits.
OF_TASKS: Mapping[str, tuple[str, str, str, int]] = {
    "result": ("GET", "/result/{id}", "done", 200),
    "task": ("GET", "/tasks/{id}", "done", 200),
    "bare": ("GET", "/tasks/{id}/result", "done", 200),
    "wait": ("GET", "/result/{id}?wait=0.01", "done", 200),
    "cancel": ("POST", "/tasks/{id}/cancel", "done", 409),
    "old cancel": ("POST", "/cancel/{id}", "done", 200),
    "retry": ("POST", "/tasks/{id}/retry", "done", 409),
    "delete": ("DELETE", "/tasks/{id}", "waits", 409),
    "look": ("GET", "/tasks/{id}", "waits", 200),
    "cancel it": ("POST", "/tasks/{id}/cancel", "waits", 200),
}
LOOKS = {"result", "task", "bare", "wait", "look"}


def of_task(asker: str, owner: str, what: str) -> int:
    """Return the status of a request about a task, as the issue has it."""
    allowed = OF_TASKS[what][3]
    if asker in ("boss", "unix"):
        return allowed
    if asker == "read":
        if what not in LOOKS:
            return 403
        return allowed if owner == "nobody" else 404
    if owner == asker or (asker == "anonymous" and owner == "nobody"):
        return allowed
    if owner == "nobody":  # one that has succeeded cannot be retried by anybody
        return allowed if what in {*LOOKS, "retry"} else 403
    return 404


async def test_tasks_are_their_keys(keyed: Settings, redis_server: RedisServer) -> None:
    """Role x what is asked x whose it is: one's own, another's, nobody's; another's is as if not there."""
    async with opened(keyed) as site:
        for name, role in (("shop", "predict"), ("lab", "predict"), ("read", "read"), ("boss", "admin")):
            site.put(name, f"gpi_{name}", role=role)
        with redis_server.client() as client:
            worker = HandWorker(client)
            worker.register()
            owners = ("shop", "lab", "boss", "nobody")
            done = {owner: await submitted(site, owner) for owner in owners}
            assert worker.finish_all({"label": "2"}) == len(owners)
            wrong: list[tuple[object, ...]] = []
            for asker, owner, what in itertools.product(ASKERS, owners, OF_TASKS):
                method, path, which, _ = OF_TASKS[what]
                task_id = done[owner] if which == "done" else await submitted(site, owner)
                by, token = ASKERS[asker]
                answer = await site.ask(method, path.format(id=task_id), by=by, token=token)
                wanted = of_task(asker, owner, what)
                if wanted == 404:  # to the letter as for an id that the same process could have made
                    other_id = task_id[:-4] + ("0000" if task_id[-4:] != "0000" else "0001")
                    nothing = await site.ask(method, path.format(id=other_id), by=by, token=token)
                    wanted = nothing.status_code if nothing.status_code in (404, 410) else 404
                    if nothing.text.replace(other_id, task_id) != answer.text:
                        wrong.append((asker, owner, what, nothing.text, answer.text))
                if answer.status_code != wanted:
                    wrong.append((asker, owner, what, answer.status_code, wanted, answer.text))
            assert wrong == []  # asker, owner, what, status, wanted
            for asker, (by, token) in ASKERS.items():
                listed = (await site.ask("GET", "/tasks?status=completed", by=by, token=token)).json()[
                    "tasks"
                ]
                whose = set(owners) if asker in ("boss", "unix") else {"nobody", *({asker} & set(owners))}
                assert {one["id"] for one in listed} == {done[owner] for owner in whose}, asker
                assert {one.get("caller", "nobody") for one in listed} == (
                    whose if asker in ("boss", "unix") else {"nobody"}
                )


async def submitted(site: Site, owner: str) -> str:
    """Submit a task as its owner; return its id."""
    by, token = ("unix", None) if owner == "nobody" else ASKERS[owner]
    answer = await site.ask("POST", "/predict", by=by, token=token, json=DIGIT)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


async def test_an_id_of_another_key_is_a_conflict(keyed: Settings, redis_server: RedisServer) -> None:
    """A client's own id stands for one request of one key. Idempotency keys are each key's own."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_shop")
        site.put("lab", "gpi_lab")
        with redis_server.client() as client:
            HandWorker(client).register()
        first = await site.ask("PUT", "/tasks/mine", token="gpi_shop", json=DIGIT)
        assert first.status_code == 202
        again = await site.ask("PUT", "/tasks/mine", token="gpi_shop", json=DIGIT)
        assert again.status_code == 202
        other = await site.ask("PUT", "/tasks/mine", token="gpi_lab", json=DIGIT)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "task_exists")
        ids = set()
        for token in ("gpi_shop", "gpi_lab", "gpi_shop"):
            once = {"idempotency-key": "order 7"}
            answer = await site.ask("POST", "/predict", token=token, json=DIGIT, headers=once)
            ids.add(answer.json()["task_id"])
        assert len(ids) == 2


async def test_nobody_can_say_who_submits(keyed: Settings) -> None:
    """Neither in the body nor in the URL."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_shop")
        body = await site.ask("POST", "/predict", token="gpi_shop", json={**DIGIT, "caller": "lab"})
        assert (body.status_code, body.json()["error"]["field"]) == (422, "caller")
        url = await site.ask("POST", "/predict?caller=lab", token="gpi_shop", json=DIGIT)
        assert (url.status_code, url.json()["error"]["field"]) == (400, "caller")


# -- what a key may use ---------------------------------------------------------------------------


async def test_models_and_queues_of_a_key(keyed: Settings, redis_server: RedisServer) -> None:
    """Others are a 403 that names the field; the lists of models hold those that it may use."""
    async with opened(keyed) as site:
        site.put("lab", "gpi_lab", models=("digits", "vqa"), queues=("batch",))
        site.put("boss", "gpi_boss", role="admin")
        with redis_server.client() as client:
            HandWorker(client, "resnet", "digits").beat()

        async def refused(method: str, path: str, body: Any = None) -> tuple[int, str | None]:
            answer = await site.ask(method, path, token="gpi_lab", json=body)
            error = answer.json().get("error", {})
            return answer.status_code, error.get("field") if isinstance(error, dict) else error.split(":")[0]

        good = {"inputs": [1], "model": "digits", "queue": "batch"}
        assert (await refused("POST", "/predict", good))[0] == 202
        assert await refused("POST", "/predict", {**good, "model": "resnet"}) == (403, "model")
        assert await refused("POST", "/predict", {**good, "model": None}) == (
            403,
            "model",
        )  # resnet, the default
        assert await refused("POST", "/models/resnet/predict", [1]) == (403, "model")
        assert await refused("PUT", "/tasks/x", {**good, "model": "resnet"}) == (403, "model")
        assert await refused("POST", "/predict", {**good, "queue": "realtime"}) == (403, "queue")
        assert await refused("POST", "/batch_predict", {**good, "queue": None, "inputs": [[1]]}) == (
            202,
            None,
        )
        assert await refused("GET", "/v2/models/resnet") == (403, "model")
        assert await refused("GET", "/v2/models/resnet/ready") == (403, "model")
        tensor = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
        for path in ("resnet", "resnet/versions/1", "nosuch/versions/1"):  # none of which is told of
            assert await refused("POST", f"/v2/models/{path}/infer", tensor) == (403, "model")
        mine = await site.ask("GET", "/models", token="gpi_lab")
        assert [one["name"] for one in mine.json()] == ["digits"]
        assert (await site.ask("GET", "/models/digits", token="gpi_lab")).json() == mine.json()[0]
        for path in ("/models/resnet", "/models/nosuch"):  # neither is told of
            assert await refused("GET", path) == (403, "model")
        index = await site.ask("POST", "/v2/repository/index", token="gpi_lab")
        assert [one["name"] for one in index.json()] == ["digits"]
        every = await site.ask("GET", "/models", token="gpi_boss")
        assert [one["name"] for one in every.json()] == ["digits", "resnet"]


async def test_what_of_the_hosts_is_told(keyed: Settings, redis_server: RedisServer) -> None:
    """Paths and processes are for administrators, in lists and in errors of tasks."""
    async with opened(keyed) as site:
        site.put("shop", "gpi_shop")
        site.put("boss", "gpi_boss", role="admin")
        with redis_server.client() as client:
            worker = HandWorker(client)
            body = {"worker": WORKER, "models": ["digits"], "queues": ["realtime"], "pid": 4711, "host": "h1"}
            body["missing"] = {"vqa": "cannot open /srv/models/vqa/w.bin"}
            worker.store.register(orjson.dumps(body), default="digits")
            task_id = await submitted(site, "shop")
            (task,) = worker.claim()
            worker.finish(task, InferenceError("OSError: '/srv/models/digits/x.bin' (model.py, line 4)"))
        paths = ("/models", f"/tasks/{task_id}", f"/tasks/{task_id}/result", f"/result/{task_id}")
        for path in ("/workers", *paths):
            told = (await site.ask("GET", path, token="gpi_shop")).text
            assert "/srv" not in told
            assert "4711" not in told
        for path in paths:
            assert "/srv/models" in (await site.ask("GET", path, token="gpi_boss")).text
        assert (await site.ask("GET", "/workers", token="gpi_boss")).json()[0]["pid"] == 4711


async def test_how_a_key_stands_by_its_rate(keyed: Settings, redis_server: RedisServer) -> None:
    """RateLimit-Policy and RateLimit with each submission by a rate; a 429 tells when to come back."""
    async with opened(keyed) as site:
        site.put("lab", "gpi_lab", rate=1 / 60, burst=2)
        site.put("shop", "gpi_shop")
        with redis_server.client() as client:
            HandWorker(client).register()
        answers = [await site.ask("POST", "/predict", token="gpi_lab", json=DIGIT) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 429]
        assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"key";q=1;w=60'}
        assert [answer.headers["ratelimit"].partition(";t=")[0] for answer in answers] == [
            '"key";r=1',
            '"key";r=0',
            '"key";r=0',
        ]
        assert answers[2].json()["error"]["code"] == "rate_limited"
        assert 30 < int(answers[2].headers["retry-after"]) <= 60
        assert "ratelimit" not in (await site.ask("POST", "/predict", token="gpi_shop", json=DIGIT)).headers


async def test_weights_of_keys_reach_redis(keyed: Settings, redis_server: RedisServer) -> None:
    """Within a second of their files, and so do changes; nothing is written where all weigh the same."""
    with redis_server.client() as client:
        async with opened(keyed) as site:
            for weight, wanted in ((1, {}), (3, {b"lab": 3.0}), (5, {b"lab": 5.0}), (1, {})):
                site.put("lab", "gpi_lab", weight=weight)
                found: dict[bytes, float] | None = None
                async with asyncio.timeout(60):
                    while found != wanted:
                        await asyncio.sleep(0.05)
                        known: Any = client.hgetall(WEIGHTS)
                        found = {name: float(value) for name, value in known.items()}


async def test_keys_that_cannot_be_read_let_nobody_in(keyed: Settings, tmp_path: Path) -> None:
    """Not even by loopback, where none would be needed; the Unix socket is for who can mend it."""
    (tmp_path / "file").write_text("")
    api = keyed.api.model_copy(update={"keys_dir": tmp_path / "file"})
    async with opened(keyed.model_copy(update={"api": api})) as site:
        for by in ("loopback", "network"):
            refused = await site.ask("GET", "/queues", by=by)
            assert refused.status_code == 401
            assert "this server cannot read its keys; see its log" in refused.text
        assert (await site.ask("GET", "/queues", token="gpi_x")).status_code == 401
        assert (await site.ask("GET", "/queues", by="unix")).status_code == 200
