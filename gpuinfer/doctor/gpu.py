# SPDX-License-Identifier: Apache-2.0
"""The GPUs: driver, health, free memory, MIG, what the kernel wrote about them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gpuinfer.doctor.child import ChildFailed, ChildHung
from gpuinfer.doctor.finding import Finding, Findings, Skipped, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.nvml import Health
from gpuinfer.gpus import PROGRAM_XIDS, Gpu, Inventory, chosen

_GIB = 1024**3
#: Less free memory than this on a GPU, and a worker can hardly load anything.
_LEAST_FREE_BYTES = _GIB // 2
_COMPUTE_PROHIBITED, _COMPUTE_EXCLUSIVE = 2, 3
_HOT_C = 90
_XID = re.compile(r"NVRM: Xid \(PCI:(?P<pci>[0-9a-fA-F:.]+)\): (?P<number>\d+)")
#: What is worth a reboot is for a person to decide.
_REBOOT = "  # if the GPU does not come back: reboot"
_SMI = "nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv"


def driver(host: Host) -> Finding:
    """The driver answers, and lists the GPUs."""
    try:
        report = host.gpus()
    except (ChildHung, ChildFailed) as exc:
        return error(f"the driver does not answer: {exc.message}", f"journalctl -k -b -g NVRM -n 20{_REBOOT}")
    found = report.inventory
    if found.failed and not found.broken:
        return error(found.reason, _fix_driver(found))
    if not found.gpus and not found.broken:
        raise Skipped(f"no NVIDIA GPU here ({found.reason})")
    cuda = f", serves CUDA up to {report.cuda}" if report.cuda else ""
    return ok(f"driver {found.driver}{cuda}, {len(found.gpus)} GPUs")


def _fix_driver(found: Inventory) -> str:
    if "mismatch" in found.reason:
        return (
            "cat /proc/driver/nvidia/version  # its old kernel module still runs: a reboot loads the new one"
        )
    if "Not Loaded" in found.reason:
        return "modprobe nvidia; dkms status; journalctl -k -b -g NVRM -n 20"
    if "Not Found" in found.reason:
        return "apt install libnvidia-ml1"
    return "nvidia-smi; journalctl -k -b -g NVRM -n 20"


def listed(host: Host) -> Findings:
    """Each GPU answers, and worker.gpus names only GPUs that are there."""
    found = _inventory(host)
    lost = [
        error(f"GPU {index} does not answer: {words}", f"journalctl -k -b -g 'NVRM: Xid' -n 20{_REBOOT}")
        for index, words in found.broken.items()
    ]
    return [*lost, *_unknown(host, found), *(ok(_describe(gpu)) for gpu in found.gpus)]


def _inventory(host: Host) -> Inventory:
    try:
        found = host.gpus().inventory
    except (ChildHung, ChildFailed):
        raise Skipped("NVML cannot be asked; see gpu.driver") from None
    if not found.gpus and not found.broken:
        raise Skipped(found.reason)
    return found


def _describe(gpu: Gpu) -> str:
    size = f", {gpu.memory_bytes / _GIB:.0f} GiB" if gpu.memory_bytes else ""
    return f"GPU {gpu.index}: {gpu.name}{size}, {gpu.pci}, {gpu.uuid}"


def _unknown(host: Host, found: Inventory) -> Iterator[Finding]:
    uuids = [gpu.uuid for gpu in found.gpus]
    uuids += [part.uuid for gpu in found.gpus for part in gpu.instances]
    indices = {str(gpu.index) for gpu in found.gpus}
    for entry in host.settings.worker.gpus:
        if entry not in indices and not any(uuid.startswith(entry) for uuid in uuids):
            yield error(f"worker.gpus names {entry}, and NVML lists no such GPU", "gpuinfer gpus --json")


def mig(host: Host) -> Findings:
    """A GPU with MIG on has instances."""
    split = [gpu for gpu in host.some_gpus().inventory.gpus if gpu.mig]
    if not split:
        raise Skipped("no GPU is split by MIG")
    return [_mig(gpu) for gpu in split]


def _mig(gpu: Gpu) -> Finding:
    if not gpu.instances:
        make = f"nvidia-smi mig -i {gpu.index} -lgip && nvidia-smi mig -i {gpu.index} -cgi PROFILE -C"
        return error(f"GPU {gpu.index} has MIG on and no instance: CUDA cannot use it", make)
    names = ", ".join(f"{part.profile} {part.uuid}" for part in gpu.instances)
    return ok(f"GPU {gpu.index} is split into {len(gpu.instances)}: {names}")


def persistence(host: Host) -> Findings:
    """The driver stays loaded while no program uses a GPU, so that a worker starts in a moment."""
    health = host.some_gpus().health
    off = [str(index) for index, state in health.items() if state.persistence is False]
    if off:
        return warning(
            f"persistence mode is off on GPU {', '.join(off)}: each first start waits for the driver",
            "systemctl enable --now nvidia-persistenced || nvidia-smi -pm 1",
        )
    return ok("persistence mode is on")


def health(host: Host) -> Findings:
    """No uncorrected memory errors, no memory that waits for a repair, no closed compute mode, no heat."""
    health = host.some_gpus().health
    found = [finding for index, state in health.items() for finding in _troubles(host, index, state)]
    return found or ok("no memory errors, nothing to repair")


def _troubles(host: Host, index: int, state: Health) -> Iterator[Finding]:
    numbers = _workers_on(host, index)
    reset = _reset(host, index, numbers)
    if state.remap_failed:
        yield error(
            f"GPU {index} has memory that could not be replaced: exchange it", f"nvidia-smi -i {index} -q"
        )
    if state.remap_pending:
        yield warning(f"GPU {index} waits for a reset to replace bad memory", reset)
    if state.ecc_uncorrected:
        yield error(
            f"GPU {index} has {state.ecc_uncorrected} uncorrected memory errors since its start", reset
        )
    if state.compute_mode == _COMPUTE_PROHIBITED:
        yield error(
            f"GPU {index} is closed to CUDA (compute mode prohibited)", f"nvidia-smi -i {index} -c DEFAULT"
        )
    if state.compute_mode == _COMPUTE_EXCLUSIVE and len(state.processes) > 1:
        yield warning(f"GPU {index} takes one process alone and has several", _SMI)
    elif state.compute_mode == _COMPUTE_EXCLUSIVE and len(numbers) > 1:
        text = f"GPU {index} takes one process alone, and {len(numbers)} workers share it (worker.per_gpu)"
        yield error(text, f"nvidia-smi -i {index} -c DEFAULT")
    if state.temperature_c is not None and state.temperature_c >= _HOT_C:
        yield warning(
            f"GPU {index} is at {state.temperature_c} °C", f"nvidia-smi -i {index} -q -d TEMPERATURE"
        )


def _reset(host: Host, index: int, numbers: Sequence[int]) -> str:
    """Return what resets a GPU: nobody may use it meanwhile, and the watcher and the daemon do."""
    units = " ".join(("gpuinfer-watcher", *(f"gpuinfer-worker@{number}" for number in numbers)))
    uuid = next(gpu.uuid for gpu in host.some_gpus().inventory.gpus if gpu.index == index)
    return (
        f"systemctl stop {units} nvidia-persistenced; nvidia-smi -i {uuid} --gpu-reset; "
        f"systemctl start nvidia-persistenced {units}"
    )


def _workers_on(host: Host, index: int) -> list[int]:
    """Return the numbers of the workers on a GPU, by the settings; by its index where those are wrong."""
    try:
        worker = host.settings.worker
    except Skipped:
        return [index]
    found = chosen(worker.gpus, host.some_gpus().inventory, worker.per_gpu)
    numbers = [n for n in found.worker_numbers if (gpu := found.of_worker(n)) and gpu.index == index]
    return numbers or [index]


def memory(host: Host) -> Findings:
    """Each GPU has memory left, or is known to be used."""
    report = host.some_gpus()
    measured = [gpu for gpu in report.inventory.gpus if gpu.memory_bytes]
    if not measured:
        raise Skipped("the GPUs report no memory of their own")
    return [_free(host, gpu, report.health.get(gpu.index, Health())) for gpu in measured]


def _free(host: Host, gpu: Gpu, state: Health) -> Finding:
    free = gpu.memory_bytes - gpu.used_bytes
    text = f"GPU {gpu.index}: {free / _GIB:.1f} of {gpu.memory_bytes / _GIB:.1f} GiB free"
    strangers = [pid for pid in state.processes if not _is_worker(host, pid)]
    if free < _LEAST_FREE_BYTES and (strangers or not state.processes):
        pids = ", ".join(map(str, strangers)) or "unknown to NVML"
        return warning(f"{text}; used by processes {pids}", _SMI)
    return ok(text)


def _is_worker(host: Host, pid: int) -> bool:
    """Tell whether a process is a worker of ours, which may use what it wants."""
    try:
        words = host.read(f"/proc/{pid}/cmdline").split("\0")
    except Skipped:
        return False
    return "worker" in words and any("gpuinfer" in word for word in words)


def xid(host: Host) -> Findings:
    """The kernel wrote no Xid, NVIDIA's word for a GPU's trouble, since the last boot."""
    if not host.may_have_gpus():
        raise Skipped("no NVIDIA GPU here")
    host.need_systemd()
    done = host.run(["journalctl", "-k", "-b", "-o", "cat", "-g", "NVRM: Xid", "--no-pager", "-n", "200"])
    if "permission" in done.stderr.lower() or "not seeing messages" in done.stderr:
        raise Skipped("this user may not read the kernel's log")
    counts: dict[tuple[str, int], int] = {}
    for match in _XID.finditer(done.stdout):
        key = (match["pci"], int(match["number"]))
        counts[key] = counts.get(key, 0) + 1
    return [_xid(pci, number, times) for (pci, number), times in counts.items()] or ok(
        "no Xid since the boot"
    )


def _xid(pci: str, number: int, times: int) -> Finding:
    show = f"journalctl -k -b -g 'Xid.*: {number}' -n 5"
    text = f"Xid {number} from {pci}, {times} times since the boot"
    if number in PROGRAM_XIDS:
        return warning(f"{text}: {PROGRAM_XIDS[number]}, a program's fault", show)
    return error(f"{text}: the GPU needs a look, and maybe a reset", f"{show}; nvidia-smi -q{_REBOOT}")
