# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer doctor`` as it is called, on this very host, with a real Redis and a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apis import Api
from tests.services import RedisServer, free_port
from tests.workers import Workers

pytestmark = pytest.mark.integration


def doctor(workers: Workers, *arguments: str, **settings: object) -> tuple[int, dict[str, Any]]:
    """Return the exit code, and check -> its first finding."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuinfer", "doctor", "--json", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env=workers.environment(**settings),
    )
    assert done.stderr == ""
    body = json.loads(done.stdout)
    found: dict[str, Any] = {}
    for finding in body["findings"]:
        found.setdefault(finding["check"], finding)
    return done.returncode, found


def test_a_sound_checkout(workers: Workers) -> None:
    """Nothing is installed, a worker runs: a request comes back, and what cannot apply is skipped."""
    workers.start()
    code, found = doctor(workers)
    errors = {name: finding for name, finding in found.items() if finding["status"] == "error"}
    # The machine's own disk, GPUs and units are what they are; what the test made must be sound.
    assert code == int(bool(errors))
    for name in ("config.file", "redis.reach", "models.digest", "work.dead"):
        assert found[name]["status"] == "ok", found[name]
    assert "1 worker runs: gpu0@" in found["work.workers"]["message"]
    assert found["work.request"]["message"].startswith("a request for digits came back after ")
    assert all(finding["remedy"] for finding in found.values() if finding["status"] in ("warning", "error"))


def test_the_api_is_asked(workers: Workers, api: Api) -> None:
    """It says itself that it is ready, or what lacks; a port nobody listens on is never ok."""
    port = api.address.rpartition(":")[2]
    _, found = doctor(workers, "work.api", api_port=port)
    assert found["work.api"]["status"] == "warning"
    assert "not ready: no live worker" in found["work.api"]["message"]
    workers.start()
    _, found = doctor(workers, "work.api", api_port=port)
    assert found["work.api"]["status"] == "ok"
    _, found = doctor(workers, "work.api", api_port=free_port())
    assert found["work.api"]["status"] != "ok"


def test_without_redis(workers: Workers, redis_server: RedisServer) -> None:
    """One error says it; the checks that need Redis refer to that one."""
    redis_server.kill()
    code, found = doctor(workers, "redis", "work")
    assert code == 1
    assert [name for name, finding in found.items() if finding["status"] == "error"] == ["redis.reach"]
    assert "nothing listens" in found["redis.reach"]["message"]
    assert found["work.request"]["message"] == "Redis cannot be asked; see redis.reach"


def test_with_wrong_settings(workers: Workers) -> None:
    """The doctor still works, and says what is wrong."""
    code, found = doctor(workers, "--quick", api_port="x")
    assert code == 1
    assert found["config.file"]["message"] == "GPUINFER_API_PORT: api.port = 'x': must be a whole number"
    assert found["config.file"]["remedy"].startswith("unset GPUINFER_API_PORT")
    assert found["redis.reach"]["message"] == "the settings cannot be read; see config.file"
    assert found["versions.torch"]["status"] == "ok"


def test_a_model_that_was_changed(workers: Workers, tmp_path: Path) -> None:
    """Its digest is an error, and it is not loaded to find that out: it was tried when it was added."""
    from gpuinfer.models.repository import SHIPPED, Repository

    artefact = Repository([tmp_path / "models"]).add(SHIPPED / "digits", "digits").artefact
    artefact.write_bytes(b"not a model")
    code, found = doctor(workers, "models", models_folders=tmp_path / "models")
    assert code == 1
    assert "it was not loaded" in found["models.digest"]["message"]
