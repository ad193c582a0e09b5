# SPDX-License-Identifier: Apache-2.0
"""Nothing of the package is imported or read after READY: an upgrade changes files under what goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx
import pytest

import gpuinfer
from gpuinfer import Client
from gpuinfer.api import schemas
from tests.apis import Api, submit
from tests.services import RedisServer
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.integration

#: Run by Python at its start, in each process that has $READS_TO: notes what it imports, and opens of ours.
NOTE = f"""
import os, sys
if os.environ.get("READS_TO"):
    to = os.open(os.environ["READS_TO"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def note(event, args):
        if event == "import" and args[0].partition(".")[0] not in sys.stdlib_module_names:
            os.write(to, f"import {{args[0]}}\\n".encode())
        elif event == "open" and str(args[0]).startswith({str(Path(gpuinfer.__file__).parent)!r}):
            if args[0].endswith(".py"):  # FastAPI looks for the lines that its messages name
                return
            os.write(to, f"open {{args[0]}}\\n".encode())
    sys.addaudithook(note)
"""


class Reads:
    """What a process reads from now on."""

    def __init__(self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / name
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site" / "sitecustomize.py").write_text(NOTE, encoding="utf-8")
        path = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        monkeypatch.setenv("READS_TO", str(self.file))
        self._known = 0

    def ready(self) -> None:
        """From here on nothing may come."""
        self._known = len(self.file.read_text(encoding="utf-8").splitlines())
        assert self._known > 100, "the process does not note what it reads"

    def since(self) -> list[str]:
        return self.file.read_text(encoding="utf-8").splitlines()[self._known :]


def _all_kinds_of_requests(api: Api, http: httpx.Client) -> None:
    ids = [submit(api) for _ in range(3)]
    for inputs in ([1, 2, 3], [[0] * 30_000]):
        assert http.post("/predict", json=inputs).status_code == 422
    job = http.post("/batch_predict", json={"inputs": [schemas.DIGIT] * 3}).json()["task_id"]
    for task_id in (*ids, job):
        http.get(f"/result/{task_id}?wait=25")
    http.get("/result/nobody")
    http.post(f"/cancel/{submit(api)}")
    for body in (b"[", b'{"inputs": [NaN]}', b'{"model": "nobody", "inputs": [1]}', b"3"):
        http.post("/predict", content=body)
    for path in ("/models", "/health/ready", "/health/live", "/docs", "/openapi.json", "/nowhere"):
        http.get(path)


def test_front_and_worker(
    redis_server: RedisServer, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through all that they are for, to their end."""
    of_worker = Reads(tmp_path, "worker.reads", monkeypatch)
    worker = workers.start()
    of_worker.ready()
    of_front = Reads(tmp_path, "front.reads", monkeypatch)
    with Api(redis_server, tmp_path) as api:
        of_front.ready()
        _all_kinds_of_requests(api, api.http)
        redis_server.kill()
        assert api.http.get("/models").status_code == 503
        redis_server.start()
        worker.wait_for_line('"redis_back"')
        wait_until(lambda: api.http.get("/health/ready").status_code == 200, 60)
        api.process.terminate()
    worker.terminate()
    assert of_worker.since() == []
    assert of_front.since() == []


def test_watcher(workers: Workers, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at tasks that wait, decides, and ends. A dry run, as those that it starts would note, too."""
    reads = Reads(tmp_path, "watcher.reads", monkeypatch)
    settings = {"watcher_backend": "process", "watcher_instances": 2, "watcher_probe_interval_s": 0.2}
    command = [sys.executable, "-m", "gpuinfer", "watcher", "run", "--dry-run"]
    watcher = workers.spawn(*command, name="watcher", **settings, watcher_assumed_rate=1)
    watcher.wait_for_line('"watching"')
    reads.ready()
    client.submit_many([[1.0]] * 50)
    watcher.wait_for_line('"scale_up"')
    assert watcher.terminate() == 0
    assert reads.since() == []
