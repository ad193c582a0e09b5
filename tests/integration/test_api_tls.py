# SPDX-License-Identifier: Apache-2.0
"""The front's own TLS: on TCP alone, renewed without dropping a connection; plain HTTP is told so."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.apis import Api, HandWorker, submit
from tests.integration.test_api_processes import children
from tests.services import Process, RedisServer, make_certificate
from tests.workers import wait_until

pytestmark = pytest.mark.integration


def shown(port: int) -> str:
    """Return the certificate that a new connection gets."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=60)


def trusting(*certificates: Path) -> ssl.SSLContext:
    """Return a context that trusts these alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for one in certificates:
        context.load_verify_locations(one)
    return context


def renew(folder: Path, live: tuple[Path, Path]) -> Path:
    """Put a new certificate in the place of the old one; return where it came from."""
    folder.mkdir()
    new = make_certificate(folder)
    for target, source in zip(live, new, strict=True):
        beside = target.with_suffix(".new")
        beside.write_bytes(source.read_bytes())
        beside.rename(target)
    return new[0]


def test_tls_is_renewed_while_all_goes_on(
    redis_server: RedisServer, worker: HandWorker, tmp_path: Path
) -> None:
    """A connection that waits is answered over the old certificate, new ones get the new one; told once.

    A process that is started after a broken renewal serves, too, with the last good one.
    """
    worker.register()
    live = make_certificate(tmp_path)
    (tmp_path / "old.crt").write_bytes(live[0].read_bytes())
    with Api(
        redis_server,
        tmp_path,
        verify=trusting(live[0]),
        api_processes=2,
        api_tls_cert=live[0],
        api_tls_key=live[1],
    ) as api:
        assert api.address.startswith("https://127.0.0.1:")
        port = int(api.address.rpartition(":")[2])
        task_id = submit(api)
        answers: list[str] = []
        waiting = threading.Thread(
            target=lambda: answers.append(api.http.get(f"/result/{task_id}?wait=50", timeout=90).text)
        )
        waiting.start()
        new = renew(tmp_path / "new", live)
        wait_until(lambda: shown(port) == new.read_text(), 60)
        wait_until(lambda: len(api.log("certificate_renewed")) == 1, 60)
        assert worker.finish_all("done") == 1
        waiting.join(60)
        assert '"completed"' in answers[0]
        live[1].write_text("broken")
        wait_until(lambda: len(api.log("certificate_refused")) == 1, 60)
        first = children(api.process.pid)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(children(api.process.pid)) - set(first)) == 2, 60)
        with httpx.Client(verify=trusting(new), timeout=60) as client:
            for _ in range(4):
                assert client.get(f"{api.address}/health/live").json() == {"status": "ok"}
            assert len(api.log("certificate_refused")) == 1
            # The client keeps its connection for later, and does not read TLS's goodbye there.
            assert api.process.terminate() == 0
        assert not api.log("uvicorn.error")


def test_plain_http_is_told_to_use_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    """Also one with a large body; what is neither is closed, and one that stalls disturbs nobody."""
    certificate, key = make_certificate(tmp_path)
    with Api(
        redis_server, tmp_path, verify=trusting(certificate), api_tls_cert=certificate, api_tls_key=key
    ) as api:
        port = int(api.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            for content in (b"[1]", b"x" * 3_000_000):
                answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=content, timeout=60)
                assert answer.status_code == 400
                assert answer.json()["error"]["code"] == "tls_required"
                assert "https://" in answer.json()["error"]["message"]
            for content in (b"\x00\x01garbage", b"\x16\x03\x01garbage and more of it"):
                with socket.create_connection(("127.0.0.1", port), 60) as other:
                    other.sendall(content)
                    with suppress(ConnectionResetError):
                        while other.recv(100):
                            continue
            submit(api)
        assert [line["code"] for line in api.log("request")] == ["tls_required"] * 2


def test_the_unix_socket_has_no_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    """Of all that systemd hands over, TCP alone is TLS."""
    certificate, key = make_certificate(tmp_path)
    listening = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    path = Path("/tmp") / f"gi-{tmp_path.name[-40:]}-{os.getpid()}.sock"
    try:
        listening[1].bind(str(path))
        listening[1].listen()
        port = listening[0].getsockname()[1]
        activate = (
            "import fcntl, os, sys; a, b = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 99) for x in sys.argv[1:]); "
            "os.dup2(a, 3); os.dup2(b, 4); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2'); "
            "os.execv(sys.executable, [sys.executable, '-m', 'gpuinfer', 'api', '--fd', '3'])"
        )
        chosen = {
            "GPUINFER_BROKER_URL": redis_server.url,
            "GPUINFER_LOG_FORMAT": "json",
            "GPUINFER_API_TLS_CERT": str(certificate),
            "GPUINFER_API_TLS_KEY": str(key),
        }
        fds = [one.fileno() for one in listening]
        with subprocess.Popen(
            [sys.executable, "-c", activate, *map(str, fds)],
            pass_fds=fds,
            env=os.environ | chosen,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                with httpx.Client(verify=trusting(certificate), timeout=60) as client:
                    assert client.get(f"https://127.0.0.1:{port}/health/live").status_code == 200
                with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
                    assert client.get("http://api/health/live").status_code == 200
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        for one in listening:
            one.close()
        path.unlink(missing_ok=True)


def test_a_broken_certificate_stops_the_start(redis_server: RedisServer, tmp_path: Path) -> None:
    """With the status of wrong settings, and the file's name."""
    chosen = {"GPUINFER_BROKER_URL": redis_server.url, "GPUINFER_API_TLS_CERT": str(tmp_path / "none.pem")}
    process = Process(
        [sys.executable, "-m", "gpuinfer", "api", "--port", "0"],
        tmp_path / "api.log",
        env=os.environ | chosen,
    )
    try:
        wait_until(lambda: not process.running, 60)
        assert "none.pem: cannot be read: No such file or directory" in process.log.read_text()
    finally:
        assert process.kill() == 78
