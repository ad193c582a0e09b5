# SPDX-License-Identifier: Apache-2.0
"""What stands for CUDA and NVML in a dry run; imported by every Python of its environment, at its start.

NVML is the fake of the other tests, with one GPU. Models that are bound to ``cuda:0`` run on the CPU, and
keep the name; a GPU that CUDA_VISIBLE_DEVICES hides, or that is full, refuses as CUDA does. What models do
to a GPU (out of memory, an assertion on the device) they pretend themselves: see ``models``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.fake_nvml import FakeNvml
from tests.gpu.dry import TOTAL_BYTES, dry_run, full, use, users

UUID = "GPU-00000000-0000"
CARD = "NVIDIA L4"


class StubNvml(FakeNvml):
    """One GPU, whose memory is used by whoever has said so."""

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=TOTAL_BYTES, used=min(TOTAL_BYTES, sum(users().values())))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in users().items()]


def visible() -> bool:
    """Tell whether CUDA would see the GPU: by index or by the beginning of its UUID."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return named == "0" or (named.startswith("GPU-") and UUID.startswith(named))


def try_device(device: str) -> None:
    """Refuse as CUDA does, in our errors."""
    from gpuinfer.errors import DeviceError, DeviceOutOfMemory

    if device != "cpu" and not visible():
        raise DeviceError(f"{device} cannot be used: RuntimeError: No CUDA GPUs are available")
    if device != "cpu" and os.getpid() not in users() and full():
        raise DeviceOutOfMemory(f"{device} cannot be used: CUDA error: out of memory")


def _patch_loader(loader: Any) -> None:
    """Let models on ``cuda:0`` run on the CPU."""
    load = loader.load

    def load_here(folder: Any, device: str, **options: Any) -> Any:
        model = load(folder, "cpu", **options)
        if device != "cpu":
            use()
            model.device = device
        return model

    loader.load = load_here


def _patch_tensor_model(tensor_model: Any) -> None:
    """Leave the tensors of models on ``cuda:0`` on the CPU."""
    to_tensor = tensor_model.to_tensor

    def to_tensor_here(column: Any, spec: Any, device: str) -> Any:
        return to_tensor(column, spec, "cpu")

    tensor_model.to_tensor = to_tensor_here


def _patch_device(device: Any) -> None:
    """Answer for the GPU when it is tried."""
    device.try_device = try_device


def _patch_sandbox(sandbox: Any) -> None:
    """Answer for the sandbox in which the doctor would compute on the GPU."""
    ask = sandbox.ask

    def ask_here(what: str, **options: Any) -> dict[str, Any]:
        if what != "cuda":
            answer: dict[str, Any] = ask(what, **options)
            return answer
        failed = {"cuda:0": "CUDA error: out of memory"} if full() else {}
        good = [] if failed else [f"cuda:0 ({CARD})"]
        return {"torch": "stub", "cuda": "13.0", "devices": good, "failed": failed, "why": "", "ms": 1}

    sandbox.ask = ask_here


def _patch_doctor(gpu: Any) -> None:
    """Let the doctor take this torch for one that is built for CUDA."""
    gpu.torch_build = lambda: ("stub", "13.0")


PATCHES: dict[str, Callable[[Any], None]] = {
    "gpuinfer.models.loader": _patch_loader,
    "gpuinfer.models.tensor_model": _patch_tensor_model,
    "gpuinfer.models.device": _patch_device,
    "gpuinfer.models.sandbox": _patch_sandbox,
    "gpuinfer.doctor.gpu": _patch_doctor,
}


class _Patched(Loader):
    """Loads a module as it is, then patches it."""

    def __init__(self, loader: Any, patch: Callable[[Any], None]) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)


class _Finder(MetaPathFinder):
    """Finds the modules that are patched."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = PATCHES.get(name)
        spec = PathFinder.find_spec(name, path, target) if patch else None
        if spec is not None and patch is not None:
            spec.loader = _Patched(spec.loader, patch)
        return spec


if dry_run():
    sys.modules["pynvml"] = StubNvml(count=1)  # type: ignore[assignment]  # its functions are methods
    sys.meta_path.insert(0, _Finder())
