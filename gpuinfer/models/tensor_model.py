# SPDX-License-Identifier: Apache-2.0
"""Batches of arrays through a module of torch: what TorchScript and torch.export have in common.

Splitting and retrying batches is the worker's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuinfer.errors import InferenceError, InputError
from gpuinfer.models import examples, padding
from gpuinfer.models.device import translate
from gpuinfer.models.files import is_file
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.outputs import render_batch
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.specs import InputSpec, OutputSpec, shape_fits
from gpuinfer.models.tensors import Array, Encoding, Item, decode_batch
from gpuinfer.models.warm_up import OutputMismatch, warm_up

if TYPE_CHECKING:
    import torch


class TensorModel(LoadedModel):
    """A module of torch that is called with one value an input. An item is one array an input.

    ``module`` takes tensors on ``device``, in the manifest's order, and plain numbers where ``numbers`` says
    so: items whose numbers differ run apart. ``before_each`` is called before each pass.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str,
        module: Callable[..., Any],
        *,
        numbers: Sequence[bool] = (),
        before_each: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(folder.manifest, device)
        self._folder = folder
        self.signature = self.signature.with_example(self.example())
        self._module = module
        self._before_each = before_each
        #: The places of inputs that are plain numbers.
        self._numbers = tuple(place for place, number in enumerate(numbers) if number)
        self._cuts: padding.Cuts = {}
        self._by_shape = folder.manifest.variable == "group" and not all(
            s.fixed for s in self.manifest.inputs
        )

    @property
    def prepares(self) -> bool:
        """True when a file may come in the place of a tensor, and be decoded."""
        return any(spec.image or spec.audio for spec in self.manifest.inputs)

    def prepares_these(self, values: Sequence[object]) -> bool:
        """Arrays and lists are decoded together, and faster than they could be handed to a thread."""
        return self.prepares and any(map(_holds_file, values))

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

    def example(self) -> Any | None:
        """Return the manifest's example."""
        return examples.example(self._folder)

    def warm_up(self, max_batch_size: int | None = None) -> int:
        """Run batches of the manifest's example, or of what is invented where it gives none."""
        largest = max(1, max_batch_size or self.manifest.max_batch_size) if self.manifest.batchable else 1
        size, item = warm_up(self, examples.candidates(self._folder), largest, self._check)
        self._learn_padding(item)
        if self.refused:
            self.warnings.append(
                f"it refuses invented inputs ({self.refused}): it was not warmed up, and batches start at "
                f"1 and grow; set {examples.keys_to_set(self.manifest)} in model.toml"
            )
        return size

    def _learn_padding(self, item: Item | None) -> None:
        """Find out what of a padded batch's outputs is padding, and warn of what cannot be cut off."""
        manifest = self.manifest
        if manifest.variable != "pad" or not manifest.batchable or all(s.fixed for s in manifest.inputs):
            return
        self._cuts = {}
        kept = [spec.name for spec in manifest.outputs]
        if item is not None:
            self._cuts, kept = padding.learn(manifest, item, self.forward)
        if kept:
            self.warnings.append(
                f"padding is not cut off its outputs {', '.join(kept)}: which part it is could not be "
                'learned; variable = "group" pads nothing'
            )

    def _check(self, output: tuple[Array, ...]) -> None:
        for spec, array in zip(self.manifest.outputs, output, strict=True):
            _check_output(spec, array)

    def forward(self, items: Sequence[Item]) -> list[tuple[Array, ...]]:
        """Run the items and return, for each in the same order, one array per output.

        Items with free dimensions are grouped by shape, or padded, as the manifest says; padding is cut off
        the outputs where warm-up has learned how. bfloat16 outputs come as float32. Raises DeviceOutOfMemory,
        DeviceError, and InferenceError for whatever else the model does; no item has a result then.
        """
        results: list[tuple[Array, ...]] = [()] * len(items)
        for places in self._groups(items):
            group = [items[place] for place in places]
            try:
                outputs = self._run(group)
            except Exception as exc:
                raise translate(exc, InferenceError, self.name) from exc
            if self._cuts and len({tuple(array.shape for array in item) for item in group}) > 1:
                pairs = zip(group, outputs, strict=True)
                outputs = [padding.cut_back(self._cuts, item, output) for item, output in pairs]
            for place, output in zip(places, outputs, strict=True):
                results[place] = output
        return results

    def _groups(self, items: Sequence[Item]) -> list[Sequence[int]]:
        """Return the places of items that run together."""
        if not items:
            return []
        if not self.manifest.batchable:
            return [(place,) for place in range(len(items))]
        if not self._by_shape and not self._numbers:
            return [range(len(items))]
        groups: dict[object, list[int]] = {}
        for place, item in enumerate(items):
            shapes = tuple(array.shape for array in item) if self._by_shape else ()
            numbers = tuple(item[number].item() for number in self._numbers)
            groups.setdefault((shapes, numbers), []).append(place)
        return list(groups.values())

    def _run(self, group: Sequence[Item]) -> list[tuple[Array, ...]]:
        import torch

        columns = [_stack(column) for column in zip(*group, strict=True)]
        if not self.manifest.batchable:
            columns = [column[0, ...] for column in columns]
        with torch.inference_mode():
            if self._before_each is not None:
                self._before_each()
            values = [
                group[0][place].item() if place in self._numbers else to_tensor(column, spec, self.device)
                for place, (column, spec) in enumerate(zip(columns, self.manifest.inputs, strict=True))
            ]
            found = self._in_order(self._module(*values))
            named = zip(self.manifest.outputs, found, strict=True)
            outputs = [_to_array(value, spec.name) for spec, value in named]
        if not self.manifest.batchable:
            return [tuple(outputs)]
        for spec, array in zip(self.manifest.outputs, outputs, strict=True):
            if array.ndim == 0 or len(array) != len(group):
                raise OutputMismatch(
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
                raise OutputMismatch(f"gave no output {missing[0]!r}; it gave {', '.join(map(str, output))}")
            return [output[name] for name in names]
        values = list(output) if isinstance(output, tuple | list) else [output]
        if len(values) != len(names):
            raise OutputMismatch(f"gave {len(values)} outputs, its manifest names {len(names)}")
        return values


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


def _to_array(value: Any, name: str) -> Array:
    """Copy an output to the host. Raises OutputMismatch for one that is no array of numbers."""
    import torch

    if not isinstance(value, torch.Tensor):
        array: Array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise OutputMismatch(f"output {name} is a {type(value).__name__}; an output must be a tensor")
        return array
    if value.is_complex():
        raise OutputMismatch(
            f"output {name} is {str(value.dtype).removeprefix('torch.')}, and JSON has no complex numbers: "
            "return torch.view_as_real(y), whose last dimension is real and imaginary"
        )
    if value.dtype == torch.bfloat16:
        value = value.float()
    return value.detach().cpu().numpy()  # type: ignore[no-any-return]


def _check_output(spec: OutputSpec, array: Array) -> None:
    """Hold one item's output against what the manifest states about it."""
    if spec.shape is not None and not shape_fits(array.shape, spec.shape):
        raise OutputMismatch(
            f"output {spec.name} has shape {list(array.shape)}, its manifest says {list(spec.shape)}"
        )
    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    if dtype is not None and array.dtype.name != dtype:
        raise OutputMismatch(f"output {spec.name} is {array.dtype.name}, its manifest says {dtype}")
    if spec.kind == "classification" and (array.ndim == 0 or array.size != array.shape[-1]):
        raise OutputMismatch(
            f"output {spec.name} has shape {list(array.shape)}; a classification needs one vector of scores"
        )
    if spec.labels and array.size != len(spec.labels):
        raise OutputMismatch(f"output {spec.name} has {array.size} classes, {len(spec.labels)} labels")


def _holds_file(value: object) -> bool:
    if is_file(value):
        return True
    return isinstance(value, Mapping) and any(map(is_file, value.values()))
