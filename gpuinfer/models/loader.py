# SPDX-License-Identifier: Apache-2.0
"""Load an artefact and run batches through it. The one module of this room that imports torch.

Both formats run code when they are loaded, so the digest is checked first, and the file that was
checked is the one that torch reads. Splitting and retrying batches is the worker's business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gpuinfer.errors import (
    DeviceError,
    DeviceOutOfMemory,
    GpuinferError,
    InferenceError,
    ModelLoadError,
)
from gpuinfer.models.manifest import FREE, Manifest, OutputSpec, TensorSpec, shape_fits
from gpuinfer.models.repository import ModelFolder, open_verified
from gpuinfer.models.tensors import Array, Item, storage_dtype

if TYPE_CHECKING:
    import torch

#: What a free dimension is in a warm-up batch.
WARM_UP_LENGTH = 8
#: TorchScript profiles its first run and compiles in its second; the third is the first at full speed.
WARM_UP_RUNS = 3
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")
_DEVICE_FAILURE = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NCCL")
_SCALARS = ("FloatType", "IntType", "BoolType", "NumberType")


def pick_device(wanted: str = "auto") -> str:
    """Return ``cuda`` or ``cpu``; ``auto`` is the CPU only where there is no GPU at all."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: ModelFolder, device: str, *, threads: int = 0) -> LoadedModel:
    """Check the digest, then load the model onto ``device`` (``cpu``, ``cuda``, ``cuda:0``).

    ``threads`` is torch's number of threads for one operation on the CPU; 0 leaves it to torch.
    Raises DigestMismatch; ModelLoadError; DeviceError, DeviceOutOfMemory when the device cannot take it.
    """
    with open_verified(folder) as file:
        import torch

        name = folder.manifest.name
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise DeviceError(f"no GPU that torch can use: cannot load {name} on {device!r}", "device")
        if threads:
            torch.set_num_threads(threads)
        reader = _load_torchscript if folder.manifest.format == "torchscript" else _load_export
        try:
            module = reader(file, device)
        except Exception as exc:
            error = _translate(exc, ModelLoadError, f"{folder.artefact} is not loaded")
            error = ModelLoadError(error.message, name) if isinstance(error, ModelLoadError) else error
            raise error from exc
    return LoadedModel(folder.manifest, device, module)


def _load_torchscript(file: BinaryIO, device: str) -> Callable[..., Any]:
    import torch

    with warnings.catch_warnings():
        # torch.jit is deprecated, yet it is what most published models are.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(file, map_location=device)  # type: ignore[no-untyped-call]
    module.eval()
    return _unwrapping_scalars(module)


def _unwrapping_scalars(module: Any) -> Callable[..., Any]:
    """Let ``forward(self, x: Tensor, k: float)`` be called with tensors: its ``k`` is taken out."""
    types = [argument.type.kind() for argument in module.forward.schema.arguments[1:]]
    scalars = [kind in _SCALARS for kind in types]
    if not any(scalars):
        return module  # type: ignore[no-any-return]
    return lambda *values: module(*(v.item() if s else v for v, s in zip(values, scalars, strict=True)))


def _load_export(file: BinaryIO, device: str) -> Callable[..., Any]:
    import torch
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(file)
    if any(value.device.type != torch.device(device).type for value in program.state_dict.values()):
        program = move_to_device_pass(program, device)
    return program.module()


def try_device(device: str) -> None:
    """Let a device count to one and give the number back: enough to learn that it works, and nothing more.

    Raises DeviceError with the driver's words; DeviceOutOfMemory when it has not even room for that. One that
    hangs does not return.
    """
    import torch

    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except Exception as exc:
        raise _translate(exc, DeviceError, f"{device} cannot be used") from exc


def _translate(exc: Exception, otherwise: type[GpuinferError], what: str) -> GpuinferError:
    """Return our error for one of torch's: out of memory, a failed device, and ``otherwise`` for the rest."""
    import torch

    if isinstance(exc, GpuinferError):
        return exc
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)):
        return DeviceOutOfMemory(f"{what}: {_first_line(exc)}")
    text = str(exc)
    if any(mark in text for mark in _OUT_OF_MEMORY):
        return DeviceOutOfMemory(f"{what}: {_last_line(text, _OUT_OF_MEMORY)}")
    if any(mark in text for mark in _DEVICE_FAILURE):
        return DeviceError(f"{what}: {_last_line(text, _DEVICE_FAILURE)}")
    return otherwise(f"{what}: {type(exc).__name__}: {_last_line(text)}")


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0][:500]


def _last_line(text: str, marks: Sequence[str] = ("",)) -> str:
    """Return the telling line: TorchScript puts its trace-back first, and the cause last.

    Behind an error of CUDA's follows advice on how to debug it: only lines with one of ``marks`` count.
    """
    lines = [line.strip() for line in text.splitlines() if any(mark in line for mark in marks)]
    lines = [line for line in lines if line]
    return (lines[-1] if lines else "no message")[:500]


class LoadedModel:
    """A model on its device. ``forward`` may be called from one thread at a time."""

    def __init__(self, manifest: Manifest, device: str, module: Callable[..., Any]) -> None:
        self.manifest = manifest
        self.device = device
        self.name = manifest.name
        self._module = module
        self._variable = not all(spec.fixed for spec in manifest.inputs)

    def warm_up(self, max_batch_size: int | None = None) -> int:
        """Run batches of zeros, of one and of the largest size, and check the outputs against the manifest.

        Returns the largest size that fits the device's memory: the one asked for (default: the
        manifest's), or a half, a quarter ... of it. Raises ModelLoadError; DeviceOutOfMemory when not
        even one item fits.
        """
        largest = max(1, max_batch_size or self.manifest.max_batch_size) if self.manifest.batchable else 1
        item = tuple(_zeros(spec) for spec in self.manifest.inputs)
        self._warm(item, 1)
        while largest > 1:
            try:
                self._warm(item, largest)
                break
            except DeviceOutOfMemory:
                largest //= 2
                self.release_cache()
        return largest

    def _warm(self, item: Item, size: int) -> None:
        try:
            for _ in range(WARM_UP_RUNS):
                outputs = self.forward([item] * size)
            for spec, array in zip(self.manifest.outputs, outputs[0], strict=True):
                _check_output(spec, array)
        except InferenceError as exc:
            raise ModelLoadError(f"warm-up with {size} of zeros failed: {exc.message}", self.name) from exc

    def probe(self) -> None:
        """Try the model's device with next to no work. Raises as ``try_device`` does."""
        try_device(self.device)

    def release_cache(self) -> None:
        """Give memory that torch holds but no tensor uses back to the device."""
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def forward(self, items: Sequence[Item]) -> list[tuple[Array, ...]]:
        """Run the items and return, for each in the same order, one array per output.

        Items with free dimensions are grouped by shape, or padded, as the manifest says; an output of a
        padded run keeps its padding. bfloat16 outputs come as float32. Raises DeviceOutOfMemory,
        DeviceError, and InferenceError for whatever else the model does; no item has a result then.
        """
        results: list[tuple[Array, ...]] = [()] * len(items)
        for places in self._groups(items):
            group = [items[place] for place in places]
            try:
                outputs = self._run(group)
            except Exception as exc:
                raise _translate(exc, InferenceError, self.name) from exc
            for place, output in zip(places, outputs, strict=True):
                results[place] = output
        return results

    def _groups(self, items: Sequence[Item]) -> list[Sequence[int]]:
        """Return the places of items that run together."""
        if not items:
            return []
        if not self.manifest.batchable:
            return [(place,) for place in range(len(items))]
        if not self._variable or self.manifest.variable == "pad":
            return [range(len(items))]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(tuple(array.shape for array in item), []).append(place)
        return list(groups.values())

    def _run(self, group: Sequence[Item]) -> list[tuple[Array, ...]]:
        import torch

        columns = [_stack(column) for column in zip(*group, strict=True)]
        if not self.manifest.batchable:
            columns = [column[0, ...] for column in columns]
        with torch.inference_mode():
            tensors = [
                _to_tensor(column, spec, self.device)
                for column, spec in zip(columns, self.manifest.inputs, strict=True)
            ]
            outputs = [_to_array(value) for value in self._in_order(self._module(*tensors))]
        if not self.manifest.batchable:
            return [tuple(outputs)]
        for spec, array in zip(self.manifest.outputs, outputs, strict=True):
            if array.ndim == 0 or len(array) != len(group):
                raise InferenceError(
                    f"output {spec.name} has shape {list(array.shape)} for a batch of {len(group)}; "
                    "its first dimension must be the batch (batchable = false is for models without one)"
                )
        return [tuple(array[place, ...] for array in outputs) for place in range(len(group))]

    def _in_order(self, output: Any) -> Sequence[Any]:
        """Return the outputs in the manifest's order; a dictionary is read by name."""
        names = [spec.name for spec in self.manifest.outputs]
        if isinstance(output, dict):
            missing = [name for name in names if name not in output]
            if missing:
                raise InferenceError(f"gave no output {missing[0]!r}; it gave {', '.join(map(str, output))}")
            return [output[name] for name in names]
        values = list(output) if isinstance(output, tuple | list) else [output]
        if len(values) != len(names):
            raise InferenceError(f"gave {len(values)} outputs, its manifest names {len(names)}")
        return values


def _zeros(spec: TensorSpec) -> Array:
    shape = tuple(WARM_UP_LENGTH if length == FREE else length for length in spec.shape)
    return np.zeros(shape, storage_dtype(spec))


def _stack(arrays: Sequence[Array]) -> Array:
    """Stack along a new dimension 0, padding with zeros at the end where shapes differ. A copy, always."""
    shape = arrays[0].shape
    if any(array.shape != shape for array in arrays):
        return _pad(arrays)
    if not shape:
        return np.array(arrays)
    # Joining along dimension 0 and reshaping is the same as np.stack, and some five times as fast.
    return np.concatenate(arrays).reshape(len(arrays), *shape)


def _pad(arrays: Sequence[Array]) -> Array:
    lengths = np.array([array.shape for array in arrays]).max(axis=0)
    batch = np.zeros((len(arrays), *lengths.tolist()), arrays[0].dtype)
    for place, array in enumerate(arrays):
        corner = tuple(slice(length) for length in array.shape)
        batch[place][corner] = array
    return batch


def _to_tensor(column: Array, spec: TensorSpec, device: str) -> torch.Tensor:
    import torch

    if spec.dtype == "bfloat16":
        return torch.from_numpy(column.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(column).to(device)


def _to_array(value: Any) -> Array:
    import torch

    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    if value.dtype == torch.bfloat16:
        value = value.float()
    array: Array = value.detach().cpu().numpy()
    return array


def _check_output(spec: OutputSpec, array: Array) -> None:
    """Hold one item's output against what the manifest states about it."""
    if spec.shape is not None and not shape_fits(array.shape, spec.shape):
        raise InferenceError(
            f"output {spec.name} has shape {list(array.shape)}, its manifest says {list(spec.shape)}"
        )
    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    if dtype is not None and array.dtype.name != dtype:
        raise InferenceError(f"output {spec.name} is {array.dtype.name}, its manifest says {dtype}")
    if spec.kind == "classification" and (array.ndim == 0 or array.size != array.shape[-1]):
        raise InferenceError(
            f"output {spec.name} has shape {list(array.shape)}; a classification needs one vector of scores"
        )
    if spec.labels and array.size != len(spec.labels):
        raise InferenceError(f"output {spec.name} has {array.size} classes, {len(spec.labels)} labels")
