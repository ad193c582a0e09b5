# SPDX-License-Identifier: Apache-2.0
"""Keys of a front that runs as a process: what the command does counts within a second, on real sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from tests.apis import Api
from tests.services import RedisServer
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def command(folder: Path, *arguments: str) -> str:
    """Call ``gpuinfer key``; return what it prints."""
    environment = os.environ | {"GPUINFER_API_KEYS_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "gpuinfer", "key", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


def own_address() -> str:
    """Return an address of this machine that is not loopback, by which a request comes from a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = str(probe.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address


def test_a_key_counts_within_a_second_and_without_a_restart(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Made, used from a network, rotated, revoked, in each of two processes.

    Loopback needs no key before the first and after the last.
    """
    folder = tmp_path / "keys.d"
    own = own_address()
    listen = ("--host", "0.0.0.0", "--port", "0")
    with Api(redis_server, tmp_path, *listen, api_keys_dir=folder, api_processes=2) as api:
        port = api.address.rpartition(":")[2]

        def status(token: str = "", host: str = own) -> int:
            """Ask on a connection of its own: any of the processes may answer."""
            headers = {"authorization": f"Bearer {token}"} if token else {}
            return httpx.get(f"http://{host}:{port}/queues", headers=headers, timeout=60).status_code

        def settles(wanted: int, token: str = "", host: str = own) -> None:
            """Wait until ten in a row are answered so."""
            wait_until(lambda: all(status(token, host) == wanted for _ in range(10)), 60)

        def told(changes: int) -> None:
            """Wait until both processes have told of so many changes."""
            wait_until(lambda: len(api.log("keys_changed")) == 2 * changes, 60)

        assert status() == 401
        assert status(host="127.0.0.1") == 200
        token = command(folder, "add", "shop")
        written = [(folder / "shop.toml").stat().st_ctime]
        told(1)
        settles(200, token)
        settles(401, host="127.0.0.1")
        assert status() == 401
        new = json.loads(command(folder, "rotate", "shop", "--json"))["token"]
        written.append((folder / "shop.toml").stat().st_ctime)
        told(2)
        settles(401, token)
        settles(200, new)
        command(folder, "revoke", "shop")
        told(3)
        settles(401, new)
        settles(200, host="127.0.0.1")
        changes = [api.log("keys_changed")[place] for place in (0, 1, 2, 3)]
        assert [{"added", "changed"} & set(one) for one in changes] == [{"added"}] * 2 + [{"changed"}] * 2
        seen = [datetime.fromisoformat(one["timestamp"]).timestamp() for one in changes]
        # Each process looks twice a second; the least, for a busy machine may hold any of them up.
        assert (
            min(at - when for at, when in zip(seen, (*written[:1] * 2, *written[1:] * 2), strict=True)) < 10
        )
        refused = api.log("requests_refused")
        # Which of two processes the parent hears of first is chance.
        assert {line["client"] for line in refused if line["code"] == "unauthorized"} <= {own, "127.0.0.1"}
        assert refused
        assert len(refused) < 10


def test_by_the_unix_socket_no_key_is_needed(redis_server: RedisServer, tmp_path: Path) -> None:
    """What its file's mode lets in is in; a key that is shown all the same counts, also as a refusal."""
    folder = tmp_path / "keys.d"
    token = command(folder, "add", "prometheus", "--role", "read")
    path = tmp_path / "api.sock"
    with Api(redis_server, tmp_path, "--socket", str(path), api_keys_dir=folder) as api:
        assert api.http.get("/queues").status_code == 200
        for shown, wanted in ((token, 403), ("gpi_unknown", 401)):
            answer = api.http.post("/predict", json=[1], headers={"x-api-key": shown})
            assert answer.status_code == wanted, answer.text
        forwarded = api.http.get("/queues", headers={"x-forwarded-for": "192.0.2.7"})
        assert forwarded.status_code == 401
