# SPDX-License-Identifier: Apache-2.0
"""Which GPUs this host has, and which of them a worker runs on.

NVML counts GPUs in PCI order; CUDA may count them otherwise ("fastest first"), and a driver may
number them differently after a reboot. So a worker is bound by UUID wherever one is known.
A GPU that is there and fails is an error with the driver's words, never a silent CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gpuinfer.errors import DeviceError
from gpuinfer.settings import WorkerSettings

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: There while NVIDIA's driver is loaded.
DRIVER = Path("/proc/driver/nvidia/version")
#: What puts torch for GPUs in the place of the one for CPUs.
CUDA_TORCH = "apt install gpuinfer-torch-cuda"
#: Values of CUDA_VISIBLE_DEVICES that hide every GPU. Not set at all hides none.
_HIDES_ALL = frozenset({"", "-1", "none", "void", "NoDevFiles"})
#: An entry of CUDA_VISIBLE_DEVICES or worker.gpus: an index or a UUID, of a GPU its beginning, too.
_ENTRY = re.compile(r"[0-9]+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+")
#: Xids that are the program's own fault, or follow from one: the GPU works on. All others are the GPU's.
#: NVIDIA's catalogue asks to restart the application, or nothing:
#: https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
#: NVIDIA's own device plugin for Kubernetes passes over the same ones (internal/rm/health.go).
PROGRAM_XIDS = {
    13: "graphics engine exception",
    31: "memory page fault",
    43: "stopped processing",
    45: "preemptive cleanup",
    68: "video processor exception",
}
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True)
class MigInstance:
    """One slice of a GPU that is split by MIG: to CUDA a device of its own."""

    #: MIG-..., what CUDA_VISIBLE_DEVICES takes.
    uuid: str
    #: Its size, as in 1g.10gb; empty when NVML does not say.
    profile: str = ""
    memory_bytes: int = 0
    used_bytes: int = 0


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance as a worker sees it; what is not known is an empty text or 0."""

    index: int
    uuid: str
    name: str = ""
    #: PCI bus id, as in 00000000:65:00.0
    pci: str = ""
    memory_bytes: int = 0
    used_bytes: int = 0
    #: MIG is on: CUDA sees the instances, and nothing of the GPU beside them.
    mig: bool = False
    instances: tuple[MigInstance, ...] = ()

    def instance(self, uuid: str) -> Gpu | None:
        """Return the MIG instance of that UUID as a GPU of its own, None when it is not of this GPU."""
        for found in self.instances:
            if found.uuid == uuid:
                name = f"{self.name} MIG {found.profile}".strip()
                memory = (found.memory_bytes, found.used_bytes)
                return Gpu(self.index, found.uuid, name, self.pci, *memory)
        return None

    @property
    def selector(self) -> str:
        """Return what CUDA_VISIBLE_DEVICES takes for this GPU."""
        return self.uuid or str(self.index)


@dataclass(frozen=True)
class Inventory:
    """What was found. ``gpus`` in the order of worker numbers when ``source`` is "settings"."""

    gpus: tuple[Gpu, ...] = ()
    source: Literal["nvml", "settings", "none"] = "none"
    #: Why there are none, or what else is wrong; empty when all is well.
    reason: str = ""
    driver: str = ""
    #: An NVIDIA driver or GPU is there and fails: no reason to take the CPU.
    failed: bool = False
    #: NVML index -> the driver's words, for GPUs that are counted and do not answer.
    broken: Mapping[int, str] = field(default_factory=dict)
    #: What NVML lists, also where the settings leave some of it out; empty where NVML is absent.
    listed: tuple[Gpu, ...] = ()
    #: Workers that share a GPU (``worker.per_gpu``): worker N runs on the GPU at place N // per_gpu.
    per_gpu: int = 1

    def of_worker(self, number: int) -> Gpu | None:
        """Return worker N's GPU: the one at its place in an explicit list, else with that index in NVML."""
        place = number // self.per_gpu
        if self.source == "settings":
            return self.gpus[place] if 0 <= place < len(self.gpus) else None
        return next((gpu for gpu in self.gpus if gpu.index == place), None)

    @property
    def places(self) -> tuple[int, ...]:
        """Return the places of the GPUs: in an explicit list, else NVML's indices."""
        if self.source == "settings":
            return tuple(range(len(self.gpus)))
        return tuple(gpu.index for gpu in self.gpus)

    def workers_at(self, place: int) -> range:
        """Return the numbers of the workers that share the GPU at a place."""
        return range(place * self.per_gpu, (place + 1) * self.per_gpu)

    @property
    def worker_numbers(self) -> tuple[int, ...]:
        """Return the numbers of the workers this host has a GPU for."""
        return tuple(number for place in self.places for number in self.workers_at(place))


@dataclass(frozen=True)
class Binding:
    """What a worker runs on, and what CUDA_VISIBLE_DEVICES must be before torch is imported."""

    device: Literal["cuda:0", "cpu"]
    #: None: leave the variable as it is.
    cuda_visible_devices: str | None
    gpu: Gpu | None = None


def list_gpus(
    explicit: Sequence[str] = (),
    *,
    per_gpu: int = 1,
    nvml: Any = None,
    nodes: Callable[[], Sequence[str]] | None = None,
    hardware: Callable[[], bool] | None = None,
) -> Inventory:
    """List this host's GPUs by NVML; never raises.

    ``explicit`` (indices or UUIDs, from ``worker.gpus``) restricts and orders what NVML lists,
    and stands in for it where NVML is absent; ``per_gpu`` workers share each. ``nvml`` is the pynvml
    module, ``nodes`` tells which /dev/nvidia<N> exist, ``hardware`` whether an NVIDIA GPU is on the PCI bus.
    """
    found = _ask_nvml(nvml or _pynvml(), nodes or device_nodes, hardware or on_pci_bus)
    return chosen(explicit, found, per_gpu)


def _pynvml() -> Any:
    import pynvml

    return pynvml


def device_nodes() -> Sequence[str]:
    """Return the GPUs' device nodes: the driver makes one per GPU."""
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def torch_build() -> tuple[str, str] | None:
    """Return torch's version and its CUDA, without the seconds that importing it takes."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"(?m)^__version__ = '([^']+)'", text)
    cuda = re.search(r"(?m)^cuda\b.* = '([^']+)'", text)
    return version[1] if version else "of unknown version", cuda[1] if cuda else ""


def wrong_torch() -> str:
    """Return what to do where torch, built only for the CPU, is all that a host with NVIDIA's driver has."""
    found = torch_build()
    if found is None or found[1] or not DRIVER.exists():
        return ""
    return f"{cpu_only(found[0])}: {CUDA_TORCH}"


def cpu_only(version: str) -> str:
    """Return that this build of torch uses no GPU."""
    return f"torch {version} is built only for the CPU"


def on_pci_bus() -> bool:
    """Tell whether an NVIDIA display controller is on the PCI bus, driver or not."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with suppress(OSError):  # a device may go away while we look
            vendor = (device / "vendor").read_text().strip()
            if vendor == _NVIDIA_VENDOR and (device / "class").read_text().startswith(_DISPLAY_CLASS):
                return True
    return False


def _ask_nvml(nvml: Any, nodes: Callable[[], Sequence[str]], hardware: Callable[[], bool]) -> Inventory:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        return Inventory(reason=f"NVML: {exc}", failed=_is_failure(nvml, exc, nodes, hardware))
    try:
        return _read_all(nvml, nodes)
    except nvml.NVMLError as exc:
        return Inventory(reason=f"NVML: {exc}", failed=True)
    finally:
        with suppress(nvml.NVMLError):  # what was read is read
            nvml.nvmlShutdown()


def _is_failure(
    nvml: Any, exc: Any, nodes: Callable[[], Sequence[str]], hardware: Callable[[], bool]
) -> bool:
    """Tell a host whose driver fails from one that has no NVIDIA GPU."""
    if nodes() or DRIVER.exists():
        return True
    if exc.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return False
    if exc.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        # The library came with some package, and there is no GPU: fine. With one: its module is missing.
        return hardware()
    return True


def _read_all(nvml: Any, nodes: Callable[[], Sequence[str]]) -> Inventory:
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    gpus: list[Gpu] = []
    broken: dict[int, str] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_read_one(nvml, index))
        except nvml.NVMLError as exc:
            broken[index] = str(exc)
    reason = "; ".join(f"GPU {index} does not answer: {words}" for index, words in broken.items())
    if not gpus and not broken:
        left = nodes()
        reason = f"NVML lists no GPU, yet there is {left[0]}" if left else "NVML lists no GPU"
        return Inventory(reason=reason, driver=driver, failed=bool(left))
    all_ = tuple(gpus)
    return Inventory(all_, "nvml", reason, driver, failed=not gpus, broken=broken, listed=all_)


def _read_one(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    total, used = _memory(nvml, handle, nvml.NVML_ERROR_NOT_SUPPORTED)
    mig, instances = _read_mig(nvml, handle)
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        pci=_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        memory_bytes=total,
        used_bytes=used,
        mig=mig,
        instances=instances,
    )


def _memory(nvml: Any, handle: Any, *unknown: int) -> tuple[int, int]:
    """Return (total, used) bytes; zeros on the errors ``unknown``.

    A GPU that shares the CPU's memory has none of its own to report.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as exc:
        if exc.value not in unknown:
            raise
        return 0, 0
    return int(memory.total), int(memory.used)


def _read_mig(nvml: Any, handle: Any) -> tuple[bool, tuple[MigInstance, ...]]:
    """Return whether MIG is on, and the instances that have a compute instance: those CUDA can use."""
    try:
        mode, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError as exc:
        if exc.value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return False, ()  # most GPUs cannot be split; an old driver does not know the question
        raise
    if mode != nvml.NVML_DEVICE_MIG_ENABLE:
        return False, ()
    slots = range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    found = (_read_instance(nvml, handle, slot) for slot in slots)
    return True, tuple(instance for instance in found if instance)


def _read_instance(nvml: Any, handle: Any, slot: int) -> MigInstance | None:
    """Read one slot; None where it is empty, or not for this user to see."""
    try:
        instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
    except nvml.NVMLError as exc:
        if exc.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION):
            return None
        raise
    forbidden = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_PERMISSION)
    total, used = _memory(nvml, instance, *forbidden)
    # NVML calls it after its GPU: "NVIDIA A100-SXM4-40GB MIG 1g.5gb".
    _, mig, profile = _text(nvml.nvmlDeviceGetName(instance)).rpartition("MIG ")
    return MigInstance(_text(nvml.nvmlDeviceGetUUID(instance)), profile if mig else "", total, used)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def chosen(explicit: Sequence[str], found: Inventory, per_gpu: int = 1) -> Inventory:
    """Restrict and order what was found by a list of indices and UUIDs; an empty one restricts nothing."""
    if not explicit:
        return replace(found, per_gpu=per_gpu)
    gpus = tuple(_match(entry, place, found) for place, entry in enumerate(explicit))
    return Inventory(
        gpus,
        "settings",
        found.reason,
        found.driver,
        broken=found.broken,
        listed=found.listed or found.gpus,
        per_gpu=per_gpu,
    )


def _match(entry: str, place: int, found: Inventory) -> Gpu:
    """Return NVML's GPU or MIG instance for an entry. What names none is refused once a worker wants it."""
    known = _known(entry, found.gpus)
    if len(known) == 1:
        return known[0]
    return Gpu(int(entry), "") if entry.isdecimal() else Gpu(place, entry)


def _known(entry: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return the GPU or MIG instance that an entry names; several where it begins the UUID of several."""
    if entry.isdecimal():
        return [gpu for gpu in gpus if gpu.index == int(entry)]
    exact = [gpu for gpu in gpus if gpu.uuid == entry]
    exact += [instance for gpu in gpus if (instance := gpu.instance(entry))]
    return exact or [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]


def named(entry: str, where: str, found: Inventory) -> Gpu | None:
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
    known = _known(entry, listed)
    if len(known) > 1:
        both = ", ".join(gpu.uuid for gpu in known)
        raise DeviceError(f"{where}: {entry} names {len(known)} GPUs: {both}")
    # The rights of this user may hide MIG instances from NVML.
    hidden = entry.startswith("MIG-") and any(gpu.mig for gpu in listed)
    if not known and listed and not hidden:
        raise DeviceError(f"{where}: {_no_such(entry, listed, found)}")
    return known[0] if known else None


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
        named(entry, f"{VISIBLE}={environ[VISIBLE]}", found)


def visible_device(
    number: int,
    worker: WorkerSettings,
    environ: Mapping[str, str],
    *,
    inventory: Inventory | None = None,
) -> Binding:
    """Decide what worker ``number`` runs on.

    One device in CUDA_VISIBLE_DEVICES is the worker's, of several the one at N // per_gpu; an empty value
    hides all GPUs. The unit sets the variable to the worker's own number, which says no more than the number
    does: it counts as not set. Raises DeviceError when the GPU that is wanted is not there, or fails.
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
        named(gpu.selector, "worker.gpus", found)
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
    """Take what the unit or the administrator has set."""
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
    return Binding("cuda:0", entry, named(entry, f"{VISIBLE}={preset}", found))


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
            "mend it, or set worker.device = 'cpu' to do without"
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


def spell(numbers: Sequence[int]) -> str:
    """Return ``GPU 0``, ``GPUs 0-3``, or ``GPUs 0, 2, 3`` where there are gaps."""
    if not numbers:
        return "none"
    if len(numbers) == 1:
        return f"GPU {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"GPUs {numbers[0]}-{numbers[-1]}"
    return "GPUs " + ", ".join(map(str, numbers))
