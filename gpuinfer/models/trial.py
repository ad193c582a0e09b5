# SPDX-License-Identifier: Apache-2.0
"""The process that ``sandbox.ask`` starts. It reads a question as JSON from standard input.

As loading a model runs its code, every question about a model is answered here. The answer is the last line
of standard output; what the model prints goes to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from gpuinfer.errors import GpuinferError, ModelLoadError
from gpuinfer.models import examples, record
from gpuinfer.models.as_json import as_json
from gpuinfer.models.compare import compare
from gpuinfer.models.device import first_line
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder


def attempt(folder: str, device: str, threads: int = 0) -> dict[str, Any]:
    """Load a model, warm it up, run its example, and compare its results alone and in a batch."""
    begin = time.perf_counter()
    model = _load(Path(folder), device, threads)
    loaded = time.perf_counter()
    fits = model.warm_up()
    warm = time.perf_counter()
    value = model.taken
    report: dict[str, Any] = {
        "model": model.name,
        "device": device,
        "signature": model.signature.to_json(),
        "max_batch_size": fits,
        "load_ms": _ms(begin, loaded),
        "warm_up_ms": _ms(loaded, warm),
        "warnings": list(model.warnings),
        "example": None,
        "result": None,
        "differences": [],
    }
    if value is not None:
        report["example"] = as_json(value)
        report |= _run_example(model, value)
    model.close()
    return report


def _load(path: Path, device: str, threads: int) -> LoadedModel:
    from gpuinfer.models.loader import load

    manifest = load_manifest(path)
    return load(ModelFolder(path=path, manifest=manifest, record=record.read(path)), device, threads=threads)


def results(model: LoadedModel, values: Sequence[Any]) -> list[Any]:
    """Run values through a model in one batch. Raises the error of the first that fails."""
    made: list[Any] = model.prepare(values)
    for step in (model.forward, model.finish):
        _raise_first(made)
        made = step(made)
    _raise_first(made)
    return made


def _raise_first(made: Sequence[Any]) -> None:
    for one in made:
        if isinstance(one, Exception):
            raise one


def _run_example(model: LoadedModel, value: Any) -> dict[str, Any]:
    begin = time.perf_counter()
    (result,) = results(model, [value])
    took = _ms(begin, time.perf_counter())
    differences = [one.to_dict() for one in compare(model, value)]
    return {"result": result, "example_ms": took, "differences": differences}


def bench(folder: str, device: str, threads: int = 0, seconds: float = 1.0) -> dict[str, Any]:
    """Measure batches of 1, 2, 4 ... up to the largest, from prepare to finish, without a queue."""
    model = _load(Path(folder), device, threads)
    fits = model.warm_up()
    value = model.taken
    if value is None:
        raise ModelLoadError(
            f"it has no example to measure with; set {examples.keys_to_set(model.manifest)}", model.name
        )
    sizes = [1 << power for power in range(fits.bit_length())]
    rows = [_measured(model, value, size, seconds) for size in dict.fromkeys([*sizes, fits])]
    return {"model": model.name, "device": device, "batches": rows}


def _measured(model: LoadedModel, value: Any, size: int, seconds: float) -> dict[str, Any]:
    spent, runs, parts = 0.0, 0, [0.0, 0.0, 0.0]
    results(model, [value] * size)
    while spent < seconds or runs < 3:
        made: list[Any] = [value] * size
        for place, step in enumerate((model.prepare, model.forward, model.finish)):
            begin = time.perf_counter()
            made = step(made)
            took = time.perf_counter() - begin
            parts[place] += took
            spent += took
            _raise_first(made)
        runs += 1
    names = ("prepare_ms", "device_ms", "finish_ms")
    each = {name: round(part / runs * 1e3, 3) for name, part in zip(names, parts, strict=True)}
    return {"batch": size, "runs": runs, "items_per_s": round(size * runs / spent, 1), **each}


def _ms(begin: float, end: float) -> float:
    return round((end - begin) * 1e3, 3)


def describe(path: str, class_name: str | None = None) -> dict[str, Any]:
    """Return what an artefact tells about its inputs and outputs."""
    from gpuinfer.models import described

    return described.describe(Path(path), class_name)


def cuda() -> dict[str, Any]:
    """Use each GPU that CUDA sees once; return which ones work, and the errors of the others."""
    import torch

    began, good, failed, why = time.perf_counter(), [], {}, ""
    for number in range(torch.cuda.device_count()):
        name, words = _use(f"cuda:{number}")
        if words:
            failed[name] = words
        else:
            good.append(name)
    if not good and not failed and torch.version.cuda is not None:
        try:
            torch.zeros(1, device="cuda")
        except Exception as exc:
            why = first_line(exc)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": good,
        "failed": failed,
        "why": why or "no reason given",
        "ms": _ms(began, time.perf_counter()),
    }


def _use(device: str) -> tuple[str, str]:
    """Return a device's name, and the driver's error if it does not work."""
    import torch

    try:
        name = f"{device} ({torch.cuda.get_device_name(device)})"
        total = float(torch.ones(1024, device=device).add_(1).sum())
    except Exception as exc:
        return device, first_line(exc)
    return name, "" if total == 2048.0 else f"1024 times (1 + 1) made {total:g}"


def main() -> None:
    """Answer one question."""
    from gpuinfer.privileges import leave_root

    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # kill this process rather than a worker
    question = orjson.loads(sys.stdin.buffer.read())
    answers = os.dup(1)
    os.dup2(2, 1)  # what a model prints is not part of the answer
    sys.stdin.close()
    leave_root(lambda _: None)  # the caller has warned already
    questions: dict[str, Callable[..., dict[str, Any]]]
    questions = {"attempt": attempt, "bench": bench, "describe": describe, "cuda": cuda}
    try:
        answer = questions[question.pop("do")](**question)
    except GpuinferError as exc:
        answer = {"error": exc.to_dict()}
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    with os.fdopen(answers, "wb") as out:
        out.write(b"\n" + orjson.dumps(answer, option=options, default=str) + b"\n")
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads that a model has started


if __name__ == "__main__":
    main()
