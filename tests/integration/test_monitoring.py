# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alert rules, in Debian's Prometheus, which scrapes a fleet under load."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import yaml  # type: ignore[import-untyped]

from gpuinfer.api.schemas import DIGIT
from gpuinfer.metrics.table import METRICS
from gpuinfer.queue import keys
from gpuinfer.queue.fleet import HOSTS
from tests.apis import Api
from tests.conftest import need
from tests.orphans import elsewhere
from tests.services import Process, RedisServer, free_port
from tests.workers import Workers, wait_until

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2] / "packaging" / "monitoring"
HOST, OTHER = socket.gethostname(), "gpu-b"
TASKS, WRONG = 300, 7
SCOPES = {one.name: one.scope for one in METRICS}


class Prometheus:
    """Debian's, scraping these addresses every second, with our alert rules."""

    def __init__(self, folder: Path, *targets: str) -> None:
        port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(FOLDER / "alerts.yml")],
            "scrape_configs": [{"job_name": "gpuinfer", "static_configs": [{"targets": [*targets]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            *(
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ),
            f"--storage.tsdb.path={folder / 'tsdb'}",
        ]
        self.process = Process(command, folder / "prometheus.log")
        self.process.wait_for_line("Server is ready")
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=60)

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return what an expression has now: labels and value of each series."""
        found = self.get("/query", query=expression)
        assert found["resultType"] == "vector", expression
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    def one(self, expression: str) -> float | None:
        found = self.ask(expression)
        assert len(found) <= 1, found
        return found[0][1] if found else None

    def shown_by(self, target: str) -> dict[str, list[dict[str, str]]]:
        """Return the names of our metrics that this address shows, each with the labels of its series."""
        found: dict[str, list[dict[str, str]]] = {}
        for labels, _ in self.ask(f'{{__name__=~"gpuinfer_.+", instance="{target}"}}'):
            stem = re.sub(r"_(bucket|sum|count)$", "", labels["__name__"])
            found.setdefault(stem if stem in SCOPES else labels["__name__"], []).append(labels)
        return found

    def close(self) -> None:
        self.http.close()
        self.process.kill()


def panels() -> Iterator[tuple[str, str]]:
    """Yield each panel's title and expressions, as Grafana would send them."""
    for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
            assert "$" not in expression, expression
            yield panel["title"], expression


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def test_names_in_both_are_in_the_table() -> None:
    """And each of the metrics that say how it goes is on the dashboard."""
    known = {one.name for one in METRICS}
    texts = [expression for _, expression in panels()] + [rule["expr"] for rule in rules()]
    used = set()
    for name in re.findall(r"\bgpuinfer_\w+", " ".join(texts)):
        stem = re.sub(r"_(bucket|sum|count)$", "", name)
        used.add(stem if stem in known else name)
    assert used - known == set()
    elsewhere = {"gpuinfer_build_info", "gpuinfer_redis_durability_info", "gpuinfer_result_bytes_total"}
    elsewhere |= {"gpuinfer_dead_letters_bytes", "gpuinfer_queue_paused", "gpuinfer_worker_up"}
    elsewhere |= {"gpuinfer_worker_tasks_total", "gpuinfer_worker_in_flight"}
    assert known - used == elsewhere


def test_alerts_fire_and_end(tmp_path: Path) -> None:
    """promtool plays series to them: each fires for its trouble, and none for a fleet that is well."""
    need(shutil.which("promtool") is not None, "promtool")
    story = Path(__file__).with_name("alerts.test.yml")
    text = story.read_text().replace("ALERTS", str(FOLDER / "alerts.yml"))
    (tmp_path / "alerts.test.yml").write_text(text)
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "alerts.test.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    named = {case["alertname"] for test in yaml.safe_load(text)["tests"] for case in test["alert_rule_test"]}
    assert named == {rule["alert"] for rule in rules()}


def told(now: float, temperature_c: int) -> bytes:
    """Return what a host's watcher would tell of GPUs, which this machine has not."""
    gpu = {"index": 0, "temperature_c": temperature_c, "memory_used": 5, "memory_total": 80, "busy": 0.5}
    return orjson.dumps(
        {
            "at": now,
            "interval_s": 1000,
            "desired": 1,
            "quarantined": 0,
            "instances": [{"state": "active"}],
            "queues": {},
            "gpus": [gpu],
        }
    )


def test_what_prometheus_sees_is_what_the_fleet_did(
    redis_server: RedisServer, workers: Workers, tmp_path: Path
) -> None:
    """Counters exactly, of two hosts; each expression of the dashboard has an answer, and no alert fires.

    Each host shows itself, and Redis's alone the fleet. To the other host Redis is at a foreign address.
    """
    need(shutil.which("prometheus") is not None, "prometheus")
    port = free_port()
    workers.start(worker_models="digits", traced=False)
    elsewhere(workers, OTHER, worker_models="digits")
    with redis_server.client() as client:
        client.config_set("bind", "127.0.0.2")
        client.config_set("port", port)
        now = float(client.time()[0])
        client.hset(HOSTS, mapping={HOST: told(now, 61), OTHER: told(now, 44)})
        mapping = {f"xid 0/31 {HOST}": 2, f"decision hold {HOST}": 1}
        client.hset(keys.COUNTS, mapping=mapping)
    body, wrong = orjson.dumps(DIGIT), orjson.dumps({"inputs": DIGIT, "encoding": "nonsense"})
    (tmp_path / OTHER / "api").mkdir(parents=True)
    far = Api(redis_server, tmp_path / OTHER / "api", host=OTHER, broker_url=f"redis://127.0.0.2:{port}/0")
    with Api(redis_server, tmp_path) as api, far:
        targets = [one.address.removeprefix("http://") for one in (api, far)]
        prometheus = Prometheus(tmp_path, *targets)
        try:
            assert api.http.post("/predict?wait=60", content=body).status_code == 200
            wait_until(lambda: prometheus.ask("gpuinfer_batch_size_count"), 60)
            for _ in range(TASKS - 1):
                assert api.http.post("/predict", content=body).status_code == 202
            for _ in range(WRONG):
                assert api.http.post("/predict", content=wrong).status_code == 422
            done = 'gpuinfer_tasks_finished_total{outcome="completed"}'
            wait_until(lambda: prometheus.one(f"sum({done})") == TASKS, 60)
            exactly = {
                "sum(gpuinfer_tasks_submitted_total)": TASKS,
                'sum(gpuinfer_tasks_finished_total{outcome!="completed"})': 0,
                "sum(gpuinfer_task_wait_seconds_count)": TASKS,
                "sum(gpuinfer_task_run_seconds_count)": TASKS,
                "sum(gpuinfer_task_total_seconds_count)": TASKS,
                "sum(gpuinfer_batch_size_sum)": TASKS,
                'sum(gpuinfer_http_requests_total{status="202"})': TASKS - 1,
                'sum(gpuinfer_http_errors_total{code="bad_input"})': WRONG,
                "sum(gpuinfer_tasks_refused_total)": 0,
                "sum(gpuinfer_tasks_waiting)": 0,
                "gpuinfer_tasks_in_flight": 0,
                f'gpuinfer_worker_up{{worker="gpu0@{HOST}"}}': 1,
                f'gpuinfer_worker_up{{worker="gpu0@{OTHER}"}}': 1,
                "sum(gpuinfer_worker_tasks_total)": TASKS,
                "sum(gpuinfer_watcher_up)": 2,
                f'gpuinfer_gpu_temperature_celsius{{instance="{targets[0]}"}}': 61,
                f'gpuinfer_gpu_temperature_celsius{{instance="{targets[1]}"}}': 44,
                'gpuinfer_model_workers{model="digits"}': 2,
            }
            for expression, value in exactly.items():
                wait_until(lambda e=expression, v=value: prometheus.one(e) == v, 60)  # type: ignore[misc]
            ours, others = map(prometheus.shown_by, targets)
            assert {SCOPES[name] for name in others} == {"host"}
            assert {SCOPES[name] for name in ours} == {"host", "fleet"}
            for shown, host in ((ours, HOST), (others, OTHER)):
                of = [
                    labels["worker"] for series in shown.values() for labels in series if "worker" in labels
                ]
                assert set(of) == {f"gpu0@{host}"}
            device_s = prometheus.one("sum(gpuinfer_device_seconds_total)")
            run_s = prometheus.one("sum(gpuinfer_task_run_seconds_sum)")
            assert device_s and run_s and 0 < device_s <= run_s + 0.001  # tasks of a batch share its time
            # A disk is shown where the package's folder is, and device memory where there is a GPU.
            there = Path("/var/lib/gpuinfer").exists()
            absent = {"gpuinfer_worker_device_memory_bytes"} | (set() if there else {"Free disk space"})
            absent |= {"increase(gpuinfer_redis_fsync_delayed_total[1m])"}  # this Redis writes no file
            for title, expression in panels():
                if not {title, expression} & absent:  # a rate needs two scrapes
                    wait_until(lambda e=expression: prometheus.ask(e), 60)  # type: ignore[misc]
            told_rules = [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]
            assert [rule["name"] for rule in told_rules if rule["health"] != "ok"] == []
            firing = {rule["name"] for rule in told_rules if rule["state"] != "inactive"}
            assert firing == {"GpuinferXid"}
            assert len(told_rules) == len(rules())
            redis_server.stop()
            wait_until(lambda: prometheus.one("sum(gpuinfer_redis_up)") == 0, 60)
            wait_until(lambda: prometheus.ask('ALERTS{alertname="GpuinferRedisAway"}'), 60)
        finally:
            prometheus.close()
