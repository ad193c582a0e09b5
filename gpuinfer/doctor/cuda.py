# SPDX-License-Identifier: Apache-2.0
"""CUDA from end to end: torch is built for it, and computes on each GPU where a worker would run."""

from __future__ import annotations

from typing import Any

from gpuinfer.doctor.finding import Finding, Findings, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.errors import ModelLoadError
from gpuinfer.gpus import CUDA_TORCH, torch_build
from gpuinfer.models import sandbox

PROBE_LIMIT_S = 60.0
_LOG = "journalctl -k -b -g NVRM -n 20"


def probe(host: Host) -> Findings:
    """Each GPU adds up some numbers, in the workers' sandbox and as their user, within a time limit."""
    gpus = host.some_gpus().inventory.gpus
    try:
        answer = sandbox.ask("cuda", gpu="all", limit_s=PROBE_LIMIT_S, quiet=True)
    except ModelLoadError as exc:
        return error(f"CUDA cannot be tried as a worker would: {exc.message}", f"{_LOG}; nvidia-smi")
    return judge(answer, len(gpus), split=any(gpu.mig for gpu in gpus))


def judge(answer: dict[str, Any], count: int, *, split: bool = False) -> Findings:
    """Turn the probe's answer into findings; ``count`` is how many GPUs NVML lists.

    Where one is ``split`` by MIG, CUDA shows a process some of them alone, and counts tell nothing.
    """
    if answer["cuda"] is None:
        return _cpu_build(answer["torch"])
    if not answer["devices"] and not answer["failed"]:
        return error(f"NVML lists {count} GPUs, CUDA none: {answer['why']}", "gpuinfer doctor gpu.nodes")
    bad = [_bad(name, words) for name, words in answer["failed"].items()]
    seen = len(answer["devices"]) + len(answer["failed"])
    if seen < count and not split:
        bad.append(
            error(f"NVML lists {count} GPUs, CUDA {seen} of them", f"gpuinfer doctor gpu.nodes; {_LOG}")
        )
    return bad or ok(
        f"{len(answer['devices'])} devices compute (torch {answer['torch']}, {answer['ms']:.0f} ms)"
    )


def _cpu_build(found: str) -> Finding:
    return error(f"torch {found} is built for the CPU alone", CUDA_TORCH)


def _bad(name: str, words: str) -> Finding:
    if "out of memory" in words:
        return warning(f"{name} is full: {words}", "nvidia-smi")
    if "busy or unavailable" in words:
        return warning(
            f"{name} belongs to another process (compute mode): {words}", "nvidia-smi -q -d COMPUTE"
        )
    return error(f"{name} does not compute: {words}", _LOG)


def torch(host: Host) -> Finding:
    """torch is installed, and built for CUDA where there is a GPU."""
    has_gpu, found = host.may_have_gpus(), torch_build()
    if found is None:
        kind = "cuda" if has_gpu else "cpu"
        return error("torch is not installed: no worker can start", f"apt install gpuinfer-torch-{kind}")
    version, cuda = found
    if has_gpu and not cuda:
        return _cpu_build(version)
    return ok(f"torch {version}, built for {f'CUDA {cuda}' if cuda else 'the CPU'}")
