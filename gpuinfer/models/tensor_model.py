# SPDX-License-Identifier: Apache-2.0
"""Batches of arrays through a module of torch: what TorchScript and torch.export have in common.

Splitting and retrying batches is the worker's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuinfer.errors import DeviceOutOfMemory, InferenceError, InputError, ModelLoadError
from gpuinfer.models.device import translate
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.outputs import render_batch
from gpuinfer.models.specs import FREE, InputSpec, OutputSpec, shape_fits
from gpuinfer.models.tensors import Array, Encoding, Item, decode_batch, storage_dtype

if TYPE_CHECKING:
    import torch

#: What a free dimension is in a warm-up batch.
WARM_UP_LENGTH = 8
#: TorchScript profiles its first run and compiles in its second; the third is the first at full speed.
WARM_UP_RUNS = 3


class TensorModel(LoadedModel):
    """A module of torch that is called with one tensor an input. An item is one array an input.

    ``module`` takes tensors on ``device``, in the manifest's order.
    """

    def __init__(self, manifest: Manifest, device: str, module: Callable[..., Any]) -> None:
        super().__init__(manifest, device)
        self._module = module
        self._variable = not all(spec.fixed for spec in manifest.inputs)

    @property
    def prepares(self) -> bool:
        """True when a file may come in the place of a tensor, and be decoded."""
        return any(spec.image or spec.audio for spec in self.manifest.inputs)

    def prepare(self, values: Sequence[object]) -> list[Item | InputError]:
        """Decode as ``tensors.decode_batch`` does."""
        return decode_batch(self.manifest, values)

    def finish(
        self,
        outputs: Sequence[tuple[Array, ...]],
        *,
        top_k: Sequence[int | None] | None = None,
        encoding: Sequence[Encoding] | None = None,
    ) -> list[dict[str, Any]]:
        """Render as ``outputs.render_batch`` does."""
        return render_batch(self.manifest, outputs, top_k=top_k, encoding=encoding)

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
                raise translate(exc, InferenceError, self.name) from exc
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
                to_tensor(column, spec, self.device)
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


def _zeros(spec: InputSpec) -> Array:
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


def to_tensor(column: Array, spec: InputSpec, device: str) -> torch.Tensor:
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
