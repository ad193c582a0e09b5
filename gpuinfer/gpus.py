# SPDX-License-Identifier: Apache-2.0
"""Which GPUs this host has, as NVML lists them, and which workers they are for.

A GPU or driver that is present and fails is told apart from a host without any: see ``Inventory.failed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

#: There while NVIDIA's driver is loaded.
DRIVER = Path("/proc/driver/nvidia/version")
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
    known = matching(entry, found.gpus)
    if len(known) == 1:
        return known[0]
    return Gpu(int(entry), "") if entry.isdecimal() else Gpu(place, entry)


def matching(entry: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return the GPU or MIG instance that an entry (an index or UUID) names; all whose UUID it begins."""
    if entry.isdecimal():
        return [gpu for gpu in gpus if gpu.index == int(entry)]
    exact = [gpu for gpu in gpus if gpu.uuid == entry]
    exact += [instance for gpu in gpus if (instance := gpu.instance(entry))]
    return exact or [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
