# SPDX-License-Identifier: Apache-2.0
"""Which GPU a worker runs on: by its number, worker.gpus and CUDA_VISIBLE_DEVICES.

NVML counts GPUs in PCI order; CUDA may count them otherwise ("fastest first"), and a driver may number them
differently after a reboot. So a worker is bound by UUID wherever one is known. A GPU that fails is an error
with the driver's words, never a silent CPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gpuinfer.errors import DeviceError
from gpuinfer.gpus import Gpu, Inventory, list_gpus, matching
from gpuinfer.settings import WorkerSettings

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Values of CUDA_VISIBLE_DEVICES that hide every GPU. Not set at all hides none.
_HIDES_ALL = frozenset({"", "-1", "none", "void", "NoDevFiles"})
#: An entry of CUDA_VISIBLE_DEVICES or worker.gpus: an index or a UUID, of a GPU its beginning, too.
_ENTRY = re.compile(r"[0-9]+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+")


@dataclass(frozen=True)
class Binding:
    """What a worker runs on, and what CUDA_VISIBLE_DEVICES must be before torch is imported."""

    device: Literal["cuda:0", "cpu"]
    #: None: leave the variable as it is.
    cuda_visible_devices: str | None
    gpu: Gpu | None = None


def visible(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the entries of CUDA_VISIBLE_DEVICES: none when it hides every GPU, None when it is not set."""
    value = environ.get(VISIBLE)
    if value is None:
        return None
    entries = tuple(entry.strip() for entry in value.split(","))
    return () if len(entries) == 1 and entries[0] in _HIDES_ALL else entries


def check_visible(environ: Mapping[str, str], *, inventory: Inventory | None = None) -> None:
    """Raise DeviceError where CUDA_VISIBLE_DEVICES names what is no device of this host.

    CUDA would stop reading there and hide the rest without a word, and the CPU would be taken. A host without
    any GPU has nothing to hide.
    """
    entries = visible(environ)
    if not entries:
        return
    found = list_gpus() if inventory is None else inventory
    for entry in entries if found.source != "none" else ():
        _named(entry, f"{VISIBLE}={environ[VISIBLE]}", found)


def visible_device(
    number: int,
    worker: WorkerSettings,
    environ: Mapping[str, str],
    *,
    inventory: Inventory | None = None,
) -> Binding:
    """Decide what worker ``number`` runs on.

    One device in CUDA_VISIBLE_DEVICES is the worker's, of several the one at N // per_gpu; an empty value
    hides all GPUs. The unit sets the variable to the worker's own number; that counts as not set. Raises
    DeviceError when the wanted GPU is missing or fails.
    """
    if worker.device == "cpu":
        return Binding("cpu", "")
    found = list_gpus(worker.gpus, per_gpu=worker.per_gpu) if inventory is None else inventory
    entries = visible(environ)
    if entries is not None and entries != (str(number),):
        return _preset(number, worker, environ[VISIBLE].strip(), entries, found)
    if found.source == "none":
        return _no_gpu(worker, found)
    gpu = found.of_worker(number)
    if gpu is None:
        raise DeviceError(_no_gpu_of(number, worker, found))
    if found.source == "settings":
        _named(gpu.selector, "worker.gpus", found)
    gpu = _whole_or_only(gpu, number) if gpu.mig else gpu
    return Binding("cuda:0", gpu.selector, gpu)


def _whole_or_only(gpu: Gpu, number: int) -> Gpu:
    """Return the one instance of a GPU split by MIG; of several, taking the first would waste the rest."""
    if not gpu.instances:
        raise DeviceError(
            f"GPU {gpu.index} has MIG on and no instance; nvidia-smi mig -cgi PROFILE -C makes one"
        )
    only = gpu.instance(gpu.instances[0].uuid)
    if len(gpu.instances) > 1 or only is None:
        raise DeviceError(
            f"GPU {gpu.index} is split into {len(gpu.instances)} MIG instances; name one, as "
            f"{VISIBLE}={gpu.instances[0].uuid}, in /etc/gpuinfer/worker@{number}.env, "
            "or list them in worker.gpus"
        )
    return only


def _preset(
    number: int, worker: WorkerSettings, preset: str, entries: tuple[str, ...], found: Inventory
) -> Binding:
    """Take what the unit or the administrator has set. Raises DeviceError."""
    if not entries:
        if worker.device == "cuda":
            raise DeviceError(f"{VISIBLE}={preset} hides every GPU, and worker.device = 'cuda' wants one")
        return Binding("cpu", preset)
    if found.source == "none":
        raise DeviceError(f"{VISIBLE}={preset}, but this host has no usable GPU: {found.reason}")
    place = number // worker.per_gpu
    if len(entries) > 1 and place >= len(entries):
        raise DeviceError(
            f"worker {number} has no GPU: {VISIBLE}={preset} {_for_workers(len(entries), worker)}"
        )
    entry = entries[place] if len(entries) > 1 else entries[0]
    return Binding("cuda:0", entry, _named(entry, f"{VISIBLE}={preset}", found))


def _no_such(entry: str, listed: Sequence[Gpu], found: Inventory) -> str:
    """Say that an entry names nothing that NVML lists."""
    if entry.isdecimal():
        return f"this host has no GPU {entry}; it has {spell([gpu.index for gpu in listed])}"
    what = "MIG instance" if entry.startswith("MIG-") else "GPU"
    known = ", ".join(gpu.uuid for gpu in listed)
    lost = f"; {found.reason}" if found.broken else ""
    return f"this host has no {what} {entry}; it has {known}{lost}"


def _no_gpu(worker: WorkerSettings, found: Inventory) -> Binding:
    if worker.device == "cuda":
        raise DeviceError(f"worker.device = 'cuda', but this host has no usable GPU: {found.reason}")
    if found.failed:
        raise DeviceError(
            f"this host has a GPU or its driver, and it fails: {found.reason}; "
            "fix it, or set worker.device = 'cpu' to do without"
        )
    return Binding("cpu", "")


def _silent(index: int, found: Inventory) -> str:
    return f"GPU {index} does not answer: {found.broken[index]}"


def _no_gpu_of(number: int, worker: WorkerSettings, found: Inventory) -> str:
    """Say why there is no GPU at a worker's place."""
    place = number // found.per_gpu
    if found.source == "settings":
        return f"worker {number} has no GPU: worker.gpus {_for_workers(len(found.gpus), worker)}"
    if place in found.broken:
        return _silent(place, found)
    of = f" for worker {number} (worker.per_gpu = {found.per_gpu})" if found.per_gpu > 1 else ""
    return f"this host has no GPU {place}{of}; it has {spell(found.places)}"


def _for_workers(count: int, worker: WorkerSettings) -> str:
    each = f", each for worker.per_gpu = {worker.per_gpu} of them" if worker.per_gpu > 1 else ""
    return f"names {count}, for workers from 0 on{each}"


def _named(entry: str, where: str, found: Inventory) -> Gpu | None:
    """Return the GPU or MIG instance that an entry of a list names; None where NVML cannot tell.

    ``where`` is the list, for the message. Raises DeviceError for an entry that names no device, or several.
    """
    if not _ENTRY.fullmatch(entry):
        raise DeviceError(
            f"{where}: {entry!r} names no device; an index, GPU-<uuid> or MIG-<uuid> does (gpuinfer gpus)"
        )
    if entry.isdecimal() and int(entry) in found.broken:
        raise DeviceError(f"{where}: {_silent(int(entry), found)}")
    listed = found.listed or (found.gpus if found.source == "nvml" else ())
    known = matching(entry, listed)
    if len(known) > 1:
        both = ", ".join(gpu.uuid for gpu in known)
        raise DeviceError(f"{where}: {entry} names {len(known)} GPUs: {both}")
    # The rights of this user may hide MIG instances from NVML.
    hidden = entry.startswith("MIG-") and any(gpu.mig for gpu in listed)
    if not known and listed and not hidden:
        raise DeviceError(f"{where}: {_no_such(entry, listed, found)}")
    return known[0] if known else None


def spell(numbers: Sequence[int]) -> str:
    """Return ``GPU 0``, ``GPUs 0-3``, or ``GPUs 0, 2, 3`` where there are gaps."""
    if not numbers:
        return "none"
    if len(numbers) == 1:
        return f"GPU {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"GPUs {numbers[0]}-{numbers[-1]}"
    return "GPUs " + ", ".join(map(str, numbers))
