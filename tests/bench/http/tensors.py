# SPDX-License-Identifier: Apache-2.0
"""Arrays of 3 x 224 x 224 float32 over HTTP: as lists in JSON, and in the Open Inference Protocol's bytes.

    python -m tests.bench.http.tensors [--seconds 8] [--connections 8]

Prints a line of JSON: how many a second by each way, their ratio, and the front's processor time for one. The
same model, worker, front and Redis; the two ways take turns.
"""

from __future__ import annotations

import http.client
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import numpy as np
import orjson

from tests.apis import Api
from tests.bench.machine import cpu_seconds
from tests.bench.models import write_models
from tests.services import RedisServer
from tests.workers import Workers

ROUNDS = 3


class Way(NamedTuple):
    """One way to ask for a prediction."""

    path: str
    body: bytes
    headers: dict[str, str]


def ways(image: np.ndarray[Any, Any]) -> dict[str, Way]:
    """Return the ways by name; each waits for its result."""
    head = orjson.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [1, *image.shape],
                    "parameters": {"binary_data_size": image.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    binary = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    as_json = Way(
        "/models/means/predict?wait=60", orjson.dumps(image.tolist()), {"content-type": "application/json"}
    )
    return {"json": as_json, "oip": Way("/v2/models/means/infer", head + image.tobytes(), binary)}


def ask(address: str, way: Way, until: float, count: Callable[[], None]) -> None:
    """Ask one after the other on one connection."""
    connection = http.client.HTTPConnection(address)
    while time.perf_counter() < until:
        connection.request("POST", way.path, way.body, way.headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{way.path}: {answer.status} {content[:300]!r}")
        count()
    connection.close()


def rate(address: str, way: Way, connections: int, seconds: float) -> float:
    """Return answers a second."""
    done = [0] * connections

    def counter(place: int) -> Callable[[], None]:
        def count() -> None:
            done[place] += 1

        return count

    began = time.perf_counter()
    threads = [
        threading.Thread(target=ask, args=(address, way, began + seconds, counter(place)))
        for place in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


@click.command()
@click.option("--seconds", default=8.0, show_default=True, help="Of one round of one way.")
@click.option("--connections", default=8, show_default=True)
def main(seconds: float, connections: int) -> None:
    """Measure, and print one line of JSON."""
    image = np.random.default_rng(1).random((3, 224, 224), dtype=np.float32)
    rates: dict[str, list[float]] = {"json": [], "oip": []}
    front_ms: dict[str, list[float]] = {"json": [], "oip": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models")
        redis = RedisServer(None)
        workers = Workers(redis, folder)
        try:
            workers.start(worker_models="means")
            with Api(redis, folder) as api:
                address = api.address.removeprefix("http://")
                pid = api.process.pid
                for way in ways(image).values():
                    rate(address, way, 2, 1.0)
                for _ in range(ROUNDS):
                    for called, way in ways(image).items():
                        before = cpu_seconds(pid)
                        found = rate(address, way, connections, seconds)
                        rates[called].append(found)
                        front_ms[called].append(1000 * (cpu_seconds(pid) - before) / (found * seconds))
        finally:
            workers.close()
            redis.close()
    figures = {called: round(median(found), 1) for called, found in rates.items()}
    times = {called: round(median(found), 2) for called, found in front_ms.items()}
    body = {"per_s": figures, "ratio": round(figures["oip"] / figures["json"], 2), "front_ms": times}
    sys.stdout.write(orjson.dumps(body | {"rounds": rates}).decode() + "\n")


if __name__ == "__main__":
    main()
