# SPDX-License-Identifier: Apache-2.0
"""The child's side of ``child.ask``: ``python -m gpuinfer.doctor.probe nvml|cuda|model``; answers in JSON."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson


def nvml() -> bytes:
    """Answer with a Report."""
    from gpuinfer.doctor.nvml import read, to_json

    return to_json(read())


def cuda() -> bytes:
    """Use each GPU that CUDA sees once."""
    import torch

    started, good, failed = time.monotonic(), [], {}
    for number in range(torch.cuda.device_count()):
        name, words = _use(torch, number)
        if words:
            failed[name] = words
        else:
            good.append(name)
    why = "" if good or failed or torch.version.cuda is None else _why_none(torch)
    answer = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": good, "failed": failed}
    return orjson.dumps({**answer, "why": why, "ms": round((time.monotonic() - started) * 1000)})


def _use(torch: Any, number: int) -> tuple[str, str]:
    """Return the device's name, and the driver's words where it does not compute."""
    device = f"cuda:{number}"
    try:
        name = f"{device} ({torch.cuda.get_device_name(number)})"
        total = float(torch.ones(1024, device=device).add_(1).sum())
    except Exception as exc:
        return device, _first_line(exc)
    return name, "" if total == 2048.0 else f"1024 times (1 + 1) made {total:g}"


def _why_none(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as exc:
        return _first_line(exc)
    return "no reason is given"


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def model(folder: str, device: str) -> bytes:
    """Load a model and run its example, or what it takes of what can be invented; tell what it refused."""
    from gpuinfer.errors import GpuinferError
    from gpuinfer.models import record
    from gpuinfer.models.loader import load
    from gpuinfer.models.manifest import load_manifest
    from gpuinfer.models.repository import ModelFolder

    path, started = Path(folder), time.monotonic()
    try:
        known = ModelFolder(path=path, manifest=load_manifest(path), record=record.read(path))
        ready = load(known, device)
        ready.warm_up(1)
    except GpuinferError as exc:
        return orjson.dumps({"error": str(exc)})
    took = round((time.monotonic() - started) * 1000)
    return orjson.dumps({"error": "", "warnings": ready.warnings, "ms": took})


def main(arguments: list[str]) -> None:
    """Answer one question on standard output, which libraries may have written to before."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than one that works
    questions = {"nvml": nvml, "cuda": cuda, "model": model}
    answer: bytes = questions[arguments[0]](*arguments[1:])  # type: ignore[operator]  # each has its own arguments
    sys.stdout.write("\n" + answer.decode() + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
