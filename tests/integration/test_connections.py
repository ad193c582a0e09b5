# SPDX-License-Identifier: Apache-2.0
"""A worker and its clients over TLS, over TCP with a password, and with a password from a credential."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from gpuinfer import Client
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue.connection import connect
from gpuinfer.settings import BrokerSettings, Settings
from tests.services import RedisServer, free_port, make_certificate
from tests.workers import Workers

pytestmark = pytest.mark.integration

PASSWORD = "p@ss:/word"  # of a server that lives for one test


@pytest.fixture(params=["tcp", "tls"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RedisServer, BrokerSettings]]:
    port = free_port()
    if request.param == "tcp":
        server = RedisServer(port=port, requirepass=PASSWORD)
        settings = BrokerSettings(url=f"redis://127.0.0.1:{port}/0", password=SecretStr(PASSWORD))
    else:
        certificate, key = make_certificate(tmp_path)
        server = RedisServer(
            tls_port=port,
            tls_cert_file=str(certificate),
            tls_key_file=str(key),
            tls_ca_cert_file=str(certificate),
            tls_auth_clients="no",
            requirepass=PASSWORD,
        )
        settings = BrokerSettings(
            url=f"rediss://127.0.0.1:{port}/0", password=SecretStr(PASSWORD), tls_ca=certificate
        )
    try:
        yield server, settings
    finally:
        server.close()


def test_worker_and_client(broker: tuple[RedisServer, BrokerSettings], tmp_path: Path) -> None:
    """Both find the server, the password comes from a credential file, and nothing prints it."""
    server, settings = broker
    images, labels = load_test_images()
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "broker_password").write_text(PASSWORD + "\n")
    workers = Workers(server, tmp_path)
    try:
        extra: dict[str, Any] = {"broker_tls_ca": settings.tls_ca} if settings.tls_ca else {}
        worker = workers.start(
            broker_url=settings.url,
            credentials_directory=tmp_path / "credentials",
            log_level="debug",
            **extra,
        )
        with Client(Settings(broker=settings)) as client:
            answers = client.results(
                client.submit_many([image.tolist() for image in images[:50]]), timeout_s=60
            )
        assert [answer["class"] for answer in answers][:10] == [int(label) for label in labels[:10]]
        assert worker.terminate() == 0
        assert PASSWORD not in worker.text()
        assert "word" not in worker.text()
    finally:
        workers.close()


@pytest.mark.parametrize("scheme", ["redis", "unix"])
def test_a_worker_works_by_a_url_with_options(scheme: str, tmp_path: Path) -> None:
    """What redis-py takes in a URL, kombu and Celery take too, or a worker would end in a traceback."""
    images, _ = load_test_images()
    with closing(RedisServer(port=(port := free_port()), requirepass=PASSWORD)) as server:
        place = f"redis://127.0.0.1:{port}/" if scheme == "redis" else server.url.partition("?")[0]
        url = f"{place}?db=3&health_check_interval=30&socket_timeout=60&protocol=3&client_name=x"
        url += f"&password={quote(PASSWORD, safe='')}"
        with closing(Workers(server, tmp_path)) as workers:
            worker = workers.start(broker_url=url, log_level="debug")
            with Client(url) as client:
                assert client.result(client.submit(images[0]), 60)
                with connect(BrokerSettings(url=url)) as plain:
                    names = [str(one["name"]) for one in plain.client_list()]
            assert names.count("x") >= 3
            assert worker.terminate() == 0
            assert PASSWORD not in worker.text()
