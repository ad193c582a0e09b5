# SPDX-License-Identifier: Apache-2.0
"""nginx with TLS before the front, as gpuinfer(7) shows it: keys, long polls, large and slow bodies."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gpuinfer.keys.key import Key, digest, make_token, serialise
from tests.apis import Api, HandWorker
from tests.conftest import need
from tests.integration.test_api_tls import trusting
from tests.services import Process, RedisServer, free_port, make_certificate
from tests.workers import wait_until

pytestmark = pytest.mark.integration

MANUAL = Path(__file__).parents[2] / "packaging" / "man" / "gpuinfer.7.scd"
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
LIVE = "/etc/letsencrypt/live/ml.example.org"
#: What Debian's own nginx.conf has around a site; its folders are this test's.
AROUND = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    {site}
}}
"""


def site(port: int, front: str, folder: Path) -> str:
    """Return the manual's site, with a port, a certificate and a front of this test's."""
    text = MANUAL.read_text()
    found = text[text.index("upstream gpuinfer {") :].split("\n```", 1)[0]
    for shown, ours in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8080", front),
        (f"{LIVE}/fullchain.pem", f"{folder}/tls.crt"),
        (f"{LIVE}/privkey.pem", f"{folder}/tls.key"),
    ):
        assert shown in found
        found = found.replace(shown, ours)
    return found


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "keys.d"
    folder.mkdir()
    return folder


@pytest.fixture
def proxy(redis_server: RedisServer, tmp_path: Path, keys_dir: Path) -> Iterator[httpx.Client]:
    """A client of nginx, which has a front without a key behind it."""
    need(NGINX is not None, "nginx")
    assert NGINX is not None
    certificate, _ = make_certificate(tmp_path)
    port = free_port()
    with Api(redis_server, tmp_path, api_keys_dir=keys_dir) as api:
        front = api.address.removeprefix("http://")
        conf = tmp_path / "nginx.conf"
        conf.write_text(AROUND.format(folder=tmp_path, site=site(port, front, tmp_path)))
        with (
            Process([NGINX, "-c", conf, "-p", tmp_path], tmp_path / "nginx.log"),
            httpx.Client(
                base_url=f"https://127.0.0.1:{port}", verify=trusting(certificate), timeout=90
            ) as client,
        ):
            wait_until(lambda: _answers(client), 60)
            yield client


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health/live").status_code == 200
    except httpx.TransportError:
        return False


def _slowly() -> Iterator[bytes]:
    yield b'{"inputs": ['
    for _ in range(3):
        time.sleep(0.1)
        yield b"1,"
    yield b"1]}"


def test_a_proxy_with_tls(proxy: httpx.Client, worker: HandWorker, keys_dir: Path) -> None:
    """It is on loopback, and its callers are not: they need a key, and with it all works as without it."""
    worker.register()
    for path in ("/queues", "/docs"):
        refused = proxy.get(path)
        assert refused.status_code == 401
        assert "gpuinfer key add NAME" in refused.json()["error"]["message"]
    token = make_token()
    (keys_dir / "shop.toml").write_text(serialise(Key(name="shop", sha256=digest(token))))
    proxy.headers["authorization"] = f"Bearer {token}"
    wait_until(lambda: proxy.get("/queues").status_code == 200, 60)
    _waits(proxy, worker)
    _bodies(proxy, worker)
    # Its own pages are those of the name that the proxy has; another's are refused.
    own = str(proxy.base_url).rstrip("/")
    assert proxy.get("/queues", headers={"Origin": own}).status_code == 200
    foreign = proxy.get("/queues", headers={"Origin": "https://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_origin")
    with ThreadPoolExecutor(8) as pool:
        statuses = pool.map(lambda _: proxy.post("/predict", json=[1]).status_code, range(200))
        assert set(statuses) == {202}
    (keys_dir / "shop.toml").unlink()
    wait_until(lambda: proxy.get("/queues").status_code == 401, 60)


def _waits(proxy: httpx.Client, worker: HandWorker) -> None:
    """A caller that waits has its answer when the task ends."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: proxy.post("/predict?wait=60", json=["x"]))
        wait_until(lambda: worker.finish_all("done") == 1, 60)
        answer = waiting.result()
    assert answer.status_code == 200
    assert answer.json()["result"] == "done"


def _bodies(proxy: httpx.Client, worker: HandWorker) -> None:
    """Large ones both ways, and one that comes in pieces."""
    large = "x" * 3_000_000
    task = proxy.post("/predict", json=[large]).json()["task_id"]
    assert worker.finish_all([large]) == 1
    assert proxy.get(f"/result/{task}").json()["result"] == [large]
    assert proxy.post("/predict", content=_slowly()).status_code == 202
    assert worker.finish_all("done") == 1
