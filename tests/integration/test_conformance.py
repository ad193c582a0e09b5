# SPDX-License-Identifier: Apache-2.0
"""The front does what its OpenAPI document says, whatever is sent: schemathesis makes the requests.

``GPUINFER_CONFORMANCE_CASES=20000 .venv/bin/python -m pytest tests/integration/test_conformance.py`` sends
as many, with another seed each time.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpuinfer.models.signature import Input, Signature
from tests.apis import Api, HandWorker
from tests.conftest import need
from tests.services import RedisServer

pytestmark = pytest.mark.integration

CASES = int(os.environ.get("GPUINFER_CONFORMANCE_CASES", "2000"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
#: 501: a model that a worker has in its settings is not unloaded over HTTP.
CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "501"]
"""
#: Seconds between two heartbeats of the worker that makes the front ready.
BEAT_S = 2.0


@pytest.mark.timeout(max(300, CASES // 10))
def test_every_answer_is_documented(redis_server: RedisServer, worker: HandWorker, tmp_path: Path) -> None:
    """No 5xx, and no status, type or body that the document does not have, over 2,000 requests and more."""
    need(find_spec("schemathesis") is not None, "schemathesis")
    signature = Signature(inputs=(Input(name="x", kind="tensor", dtype="float32", shape=(2,)),))
    worker.store.membership.signatures = {"digits": json.dumps(signature.to_json()).encode()}
    worker.beat()
    (tmp_path / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    with Api(redis_server, tmp_path, api_max_wait_s=0.01, queue_max_waiting=10_000_000) as api:
        paths = api.http.get("/openapi.json").json()["paths"]
        operations = sum(len(methods) for methods in paths.values())
        seed = 16 if CASES <= 2000 else random.SystemRandom().randrange(2**31)
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{api.address}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--phases", "examples,fuzzing", "--seed", str(seed)),
            # Operations without parameters have few cases.
            *("--max-examples", str(round(1.4 * CASES / operations)), "--continue-on-failure"),
            *("--suppress-health-check", "all", "--generation-database", "none", "--no-color"),
        ]
        log = tmp_path / "schemathesis.log"
        with (
            log.open("wb") as out,
            subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path) as run,
        ):
            while run.poll() is None:
                worker.beat()
                try:
                    run.wait(BEAT_S)
                except subprocess.TimeoutExpired:
                    continue
        text = log.read_text(encoding="utf-8")
        assert run.returncode == 0, f"seed {seed}\n{text}"
        generated = re.search(r"(\d+) generated", text)
        assert generated, text
        assert int(generated[1]) >= CASES, text
