# SPDX-License-Identifier: Apache-2.0
"""A worker and its clients over TLS, over TCP with a password, and with a password from a credential."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gpuinfer import Client
from gpuinfer.models.shipped import load_test_images
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
                client.submit_many([image.tolist() for image in images[:50]]), timeout_s=15
            )
        assert [answer["class"] for answer in answers][:10] == [int(label) for label in labels[:10]]
        assert worker.terminate() == 0
        assert PASSWORD not in worker.text()
        assert "word" not in worker.text()
    finally:
        workers.close()
