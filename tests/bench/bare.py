# SPDX-License-Identifier: Apache-2.0
"""Bare loops: decode JSON, run the same batches, encode JSON. No queue, no checks; what Python allows.

As a process of its own: ``python -m tests.bench.bare MODEL.pt COUNT BATCH json|orjson`` prints the seconds.
A model's input is decided by its name: 64 floats for the perceptron, one for the slow model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from tests.bench.baseline import LABELS, TOP_K
from tests.bench.machine import WORKER_CORE, pinned


def seconds(model: Path, count: int, batch: int, codec: str = "json") -> float:
    """Time a bare loop in a process pinned like the worker."""
    command = [sys.executable, "-m", __name__, str(model), str(count), str(batch), codec]
    with pinned(WORKER_CORE):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"the bare loop failed\n{done.stderr[-4000:]}")
    return float(done.stdout)


def _classes(scores: Any) -> list[dict[str, Any]]:
    """Render a batch of scores as gpuinfer renders them."""
    confidence, best = scores.softmax(1).topk(TOP_K)
    rows = []
    for numbers, values in zip(best.tolist(), confidence.tolist(), strict=True):
        ranked = [
            {"class": n, "label": LABELS[n], "confidence": round(v, 6)}
            for n, v in zip(numbers, values, strict=True)
        ]
        rows.append({**ranked[0], "top_k": ranked, "model": "perceptron", "device": "cpu"})
    return rows


def _raw(outputs: Any) -> list[dict[str, Any]]:
    return [{"outputs": {"twice": row}} for row in outputs.tolist()]


def _loop(
    model: Any,
    texts: list[bytes],
    batch: int,
    loads: Callable[[bytes], Any],
    dumps: Callable[[Any], str | bytes],
    render: Callable[[Any], list[dict[str, Any]]],
) -> list[str | bytes]:
    import torch

    results: list[str | bytes] = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            inputs = [loads(text) for text in texts[start : start + batch]]
            results += [dumps(row) for row in render(model(torch.tensor(inputs)))]
    return results


def main(path: str, count: int, batch: int, codec: str) -> None:
    """Load, warm up with zeros, run once, print the seconds."""
    import torch

    from tests.bench.models import scalars, vectors

    torch.set_num_threads(1)
    model = torch.jit.load(path)  # type: ignore[no-untyped-call]  # torch left it out
    slow = "steady" in path
    inputs, render = (scalars(count), _raw) if slow else (vectors(count), _classes)
    texts = [json.dumps(value).encode() for value in inputs]
    with torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(min(batch, count), 1 if slow else 64))
    loads, dumps = (json.loads, json.dumps) if codec == "json" else (orjson.loads, orjson.dumps)
    began = time.perf_counter()
    results = _loop(model, texts, batch, loads, dumps, render)
    took = time.perf_counter() - began
    if len(results) != count:
        raise RuntimeError(f"{len(results)} results for {count} inputs")
    print(took)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
