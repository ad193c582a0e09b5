# SPDX-License-Identifier: Apache-2.0
"""The GPUs: driver, health, free memory, the kernel's messages, and CUDA where a worker would run."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from typing import Any

from gpuinfer.doctor.host import Finding, Findings, Host, Skipped, error, ok, warning
from gpuinfer.doctor.units import show
from gpuinfer.errors import ModelLoadError
from gpuinfer.gpus import PROGRAM_XIDS, Gpu, chosen
from gpuinfer.installed_torch import CUDA_TORCH, cpu_only, torch_build
from gpuinfer.models import sandbox
from gpuinfer.plural import many
from gpuinfer.privileges import WORKER_USER

PROBE_LIMIT_S = 60.0
_GIB = 1024**3
#: With less free memory than this on a GPU a worker cannot load a model.
_LEAST_FREE_BYTES = _GIB // 2
_COMPUTE_PROHIBITED = 2
_XID = re.compile(r"NVRM: Xid \(PCI:(?P<pci>[0-9a-fA-F:.]+)\): (?P<number>\d+)")
_NVRM = "journalctl -k -b -g NVRM -n 20"
#: Whether to reboot is for a person to decide.
_REBOOT = "  # if the GPU does not come back: reboot"
_SMI = "nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv"
#: CUDA sees no GPU: nodes are missing (a worker's start makes them, too), or closed to the workers' user.
_NODES = (
    "ls -l /dev/nvidia*; /usr/lib/gpuinfer/bin/make-device-nodes || nvidia-modprobe -u -c 0"
    f"; usermod -aG $(stat -c %G /dev/nvidiactl) {WORKER_USER}"
)
#: NVML's words for why it does not work -> the remedy.
_FIX_DRIVER = {
    "mismatch": "cat /proc/driver/nvidia/version  # the old kernel module still runs: a reboot loads the new",
    "Not Loaded": f"modprobe nvidia; dkms status; {_NVRM}",
    "Not Found": "apt install libnvidia-ml1",
    "does not answer": f"{_NVRM}{_REBOOT}",
    "": f"nvidia-smi; {_NVRM}",
}


def driver(host: Host) -> Findings:
    """The driver answers, and so does each GPU; one that is split by MIG has instances."""
    report = host.gpus()
    found = report.inventory
    if found.failed and not found.broken:
        return error(found.reason, next(fix for words, fix in _FIX_DRIVER.items() if words in found.reason))
    if not found.gpus and not found.broken:
        raise Skipped(f"no NVIDIA GPU here ({found.reason})")
    cuda = f", serves CUDA up to {report.cuda}" if report.cuda else ""
    look = f"journalctl -k -b -g 'NVRM: Xid' -n 20{_REBOOT}"
    lost = [error(f"GPU {index} does not answer: {words}", look) for index, words in found.broken.items()]
    text = f"driver {found.driver}{cuda}, {many(len(found.gpus), 'GPU')}"
    return [ok(text), *lost, *map(_describe, found.gpus)]


def _describe(gpu: Gpu) -> Finding:
    if gpu.mig and not gpu.instances:
        make = f"nvidia-smi mig -i {gpu.index} -lgip && nvidia-smi mig -i {gpu.index} -cgi PROFILE -C"
        return error(f"GPU {gpu.index} has MIG on and no instance: CUDA cannot use it", make)
    size = f", {gpu.memory_bytes / _GIB:.0f} GiB" if gpu.memory_bytes else ""
    parts = "".join(f", {part.profile} {part.uuid}" for part in gpu.instances)
    return ok(f"GPU {gpu.index}: {gpu.name}{size}, {gpu.pci}, {gpu.uuid}{parts}")


def health(host: Host) -> Findings:
    """No GPU has memory errors, is closed to CUDA, or waits for its driver at each start."""
    report, bad = host.some_gpus(), []
    for gpu in report.inventory.gpus:
        name, state, reset = f"GPU {gpu.index}", report.health[gpu.index], _reset(host, gpu)
        if state.persistence == 0:
            fix = "systemctl enable --now nvidia-persistenced || nvidia-smi -pm 1"
            bad.append(warning(f"{name}: persistence mode is off: first starts wait for the driver", fix))
        if state.remap_failed:
            text = f"{name} has bad memory that it could not replace: exchange the GPU"
            bad.append(error(text, f"nvidia-smi -i {gpu.index} -q"))
        if state.remap_pending:
            bad.append(warning(f"{name} needs a reset to replace bad memory", reset))
        if state.ecc_uncorrected:
            text = f"{name} has {state.ecc_uncorrected} uncorrected memory errors since its driver was loaded"
            bad.append(error(text, reset))
        if state.compute_mode == _COMPUTE_PROHIBITED:
            fix = f"nvidia-smi -i {gpu.index} -c DEFAULT"
            bad.append(error(f"{name} is closed to CUDA (compute mode prohibited)", fix))
    return bad or ok("no memory errors, nothing to repair, persistence mode is on")


def _reset(host: Host, gpu: Gpu) -> str:
    """Return what resets a GPU: all that may use it is stopped, and of it what runs now is started again."""
    numbers = []
    with suppress(Skipped):  # the settings are wrong
        worker = host.settings.worker
        found = chosen(worker.gpus, host.some_gpus().inventory, worker.per_gpu)
        numbers = [n for n in found.worker_numbers if (one := found.of_worker(n)) and one.index == gpu.index]
    workers = [f"gpuinfer-worker@{number}" for number in numbers or [gpu.index]]
    units = running = ["nvidia-persistenced", "gpuinfer-watcher", *workers]
    with suppress(Skipped):  # systemd does not run here
        shown = zip(units, show(host, units, "ActiveState"), strict=True)
        running = [name for name, unit in shown if unit["ActiveState"] in ("active", "activating")]
    fix = f"systemctl stop {' '.join(units)}; nvidia-smi -i {gpu.uuid} --gpu-reset"
    return f"{fix}; systemctl start {' '.join(running)}" if running else fix


def memory(host: Host) -> Findings:
    """No other program fills the memory of a GPU."""
    report, found = host.some_gpus(), list[Finding]()
    for gpu in (gpu for gpu in report.inventory.gpus if gpu.memory_bytes):
        pids = report.health[gpu.index].processes
        others = [str(pid) for pid in pids if not _is_worker(host, pid)]
        free = gpu.memory_bytes - gpu.used_bytes
        text = f"GPU {gpu.index}: {free / _GIB:.1f} of {gpu.memory_bytes / _GIB:.1f} GiB free"
        if free < _LEAST_FREE_BYTES and (others or not pids):
            text += f"; used by processes {', '.join(others) or 'unknown to NVML'}"
            found.append(warning(text, _SMI))
        else:
            found.append(ok(text))
    if not found:
        raise Skipped("the GPUs report no memory of their own")
    return found


def _is_worker(host: Host, pid: int) -> bool:
    """Tell whether a process is a worker of ours, which may use what it wants."""
    try:
        words = host.read(f"/proc/{pid}/cmdline").split("\0")
    except Skipped:
        return False
    return "worker" in words and any("gpuinfer" in word for word in words)


def xid(host: Host) -> Findings:
    """The kernel has logged no Xid, NVIDIA's number for a GPU's fault, since the last boot."""
    if not host.may_have_gpus():
        raise Skipped("no NVIDIA GPU here")
    host.need_systemd()
    done = host.run(["journalctl", "-k", "-b", "-o", "cat", "-g", "NVRM: Xid", "--no-pager", "-n", "200"])
    if "permission" in done.stderr.lower() or "not seeing messages" in done.stderr:
        raise Skipped("this user may not read the kernel's log")
    counts = Counter((match["pci"], int(match["number"])) for match in _XID.finditer(done.stdout))
    bad = []
    for (pci, number), times in counts.items():
        show = f"journalctl -k -b -g 'Xid.*: {number}' -n 5"
        text = f"Xid {number} from {pci}, {many(times, 'time')} since the boot"
        if number in PROGRAM_XIDS:
            bad.append(warning(f"{text}: {PROGRAM_XIDS[number]}, a program's fault", show))
        else:
            fix = f"{show}; nvidia-smi -q{_REBOOT}"
            bad.append(error(f"{text}: the GPU is at fault and may need a reset", fix))
    return bad or ok("no Xid since the boot")


def torch(host: Host) -> Finding:
    """torch is installed, and built for CUDA where there is a GPU."""
    has_gpu, found = host.may_have_gpus(), torch_build()
    if found is None:
        kind = "cuda" if has_gpu else "cpu"
        return error("torch is not installed: no worker can start", f"apt install gpuinfer-torch-{kind}")
    version, cuda = found
    if has_gpu and not cuda:
        return error(cpu_only(version), CUDA_TORCH)
    return ok(f"torch {version}, built for {f'CUDA {cuda}' if cuda else 'the CPU'}")


def probe(host: Host) -> Findings:
    """Each GPU computes, in the workers' sandbox and as their user, within a time limit."""
    gpus = host.some_gpus().inventory.gpus
    try:
        answer = sandbox.ask("cuda", gpu="all", limit_s=PROBE_LIMIT_S, quiet=True)
    except ModelLoadError as exc:
        return error(f"CUDA cannot be tried as a worker would: {exc.message}", f"{_NVRM}; nvidia-smi")
    return judge(answer, len(gpus), split=any(gpu.mig for gpu in gpus))


def judge(answer: dict[str, Any], count: int, *, split: bool = False) -> Findings:
    """Turn the probe's answer into findings; ``count`` is how many GPUs NVML lists.

    Where one is ``split`` by MIG, CUDA shows a process only some of them, and counts tell nothing.
    """
    if answer["cuda"] is None:
        return error(cpu_only(answer["torch"]), CUDA_TORCH)
    good, failed, listed = answer["devices"], answer["failed"], f"NVML lists {many(count, 'GPU')}, CUDA"
    if not good and not failed:
        return error(f"{listed} none: {answer['why']}", _NODES)
    bad = [_not_computing(name, words) for name, words in failed.items()]
    seen = len(good) + len(failed)
    if seen < count and not split:
        bad.append(error(f"{listed} {seen} of them", f"ls -l /dev/nvidia*; {_NVRM}"))
    text = many(len(good), "device computes", "devices compute")
    return bad or ok(f"{text} (torch {answer['torch']}, {answer['ms']:.0f} ms)")


def _not_computing(name: str, words: str) -> Finding:
    if "out of memory" in words:
        return warning(f"{name} is full: {words}", "nvidia-smi")
    if "busy or unavailable" in words:
        return warning(f"{name} is held by another process: {words}", "nvidia-smi -q -d COMPUTE")
    return error(f"{name} does not compute: {words}", _NVRM)
