# SPDX-License-Identifier: Apache-2.0
"""The format Python: a class with ``load`` and ``predict``, in its own file, which need not import gpuinfer.

::

    class Ocr:
        def load(self, ctx): ...              # once; ctx is a context.Context
        def prepare(self, item): ...          # optional: one item, off the device thread
        def predict(self, batch) -> list: ... # as many outputs as items, in their order
        def finish(self, out): ...            # optional: one output, off the device thread

With ``batchable = false`` predict takes one item and returns one output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from gpuinfer.errors import GpuinferError, InferenceError, InputError, MissingInput, ModelLoadError
from gpuinfer.models import examples
from gpuinfer.models import signature as signatures
from gpuinfer.models.answers import as_array, to_json
from gpuinfer.models.blame import FAILURES, blame, without_trace
from gpuinfer.models.code import class_of, importing, run_file
from gpuinfer.models.context import Context, Work, logger_of, working
from gpuinfer.models.examples import Candidate
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.outputs import render_batch
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.signature import Signature, Typed, outputs_of
from gpuinfer.models.specs import OutputSpec
from gpuinfer.models.tensors import Array, Encoding, decode_batch
from gpuinfer.models.values import Reader, TemporaryFile, reader_of
from gpuinfer.models.warm_up import OutputMismatch, warm_up
from gpuinfer.models.words import end_lines


def read(folder: ModelFolder, file: BinaryIO, device: str) -> PythonModel:
    """Import the model's file, create an instance of its class, and call load. Raises ModelLoadError."""
    manifest = folder.manifest
    with importing(folder.path), working(Work(model=manifest.name)):
        module = run_file(folder, file)
        cls = class_of(module, manifest)
        signature, typed = _signature(cls, manifest)
        try:
            instance = cls()
            context = Context(
                device=device,
                folder=folder.path,
                parameters=manifest.parameters,
                log=logger_of(manifest.name),
            )
            if hasattr(instance, "load"):
                instance.load(context)
        except FAILURES as exc:
            raise blame(exc, folder.path, f"{cls.__name__}.load failed", ModelLoadError) from exc
        finally:
            end_lines()
    return PythonModel(folder, device, instance, signature, typed)


def _signature(cls: type, manifest: Manifest) -> tuple[Signature, tuple[Typed, ...]]:
    """Return the signature from the manifest, or else from the annotations."""
    for method in ("load", "prepare", "predict", "finish"):
        if inspect.iscoroutinefunction(getattr(cls, method, None)):
            raise ModelLoadError(f"{cls.__name__}.{method} is async; it must be a plain method")
    stated = signatures.from_manifest(manifest)
    if stated is not None:
        return stated, tuple(Typed(input=one) for one in stated.inputs)
    return signatures.from_class(cls, batchable=manifest.batchable)


@dataclass(slots=True)
class _Held:
    """An item or output, with the temporary files that it may refer to."""

    value: Any
    files: tuple[TemporaryFile, ...]


def _with_files(item: dict[str, Any]) -> Any:
    """Replace temporary files by their paths, and keep them as long as the item exists."""
    files = tuple(one for one in item.values() if isinstance(one, TemporaryFile))
    if not files:
        return item
    bare = {name: one.path if isinstance(one, TemporaryFile) else one for name, one in item.items()}
    return _Held(bare, files)


class PythonModel(LoadedModel):
    """A model that is a Python object. An item is one element of ``predict``'s batch.

    That is the value of the only input, or a dictionary of names to values, after ``prepare``.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str,
        instance: Any,
        signature: Signature,
        typed: Sequence[Typed],
    ) -> None:
        super().__init__(folder.manifest, device)
        self.instance = instance
        self._folder = folder.path
        self._model_folder = folder
        self.signature = replace(signature, outputs=outputs_of(folder.manifest)).with_example(self.example())
        self._prepare: Callable[[Any], Any] | None = getattr(instance, "prepare", None)
        self._finish: Callable[[Any], Any] | None = getattr(instance, "finish", None)
        self._before: Callable[[], object] | None = None
        if folder.manifest.before_each:
            self._before = getattr(instance, folder.manifest.before_each, None)
            if not callable(self._before):
                raise ModelLoadError(
                    f"before_each = {folder.manifest.before_each!r} is no method of {type(instance).__name__}"
                )
        specs = {spec.name: spec for spec in folder.manifest.inputs}
        self._readers: dict[str, Reader] = {
            one.input.name: reader_of(one, specs.get(one.input.name)) for one in typed
        }
        #: Whether all inputs are tensors described by the manifest, so that a batch is decoded at once.
        self._plain = bool(specs) and all(spec.kind == "tensor" for spec in specs.values())

    @property
    def prepares(self) -> bool:
        """Whether the model has a method ``prepare``, or its inputs are not all tensors."""
        return self._prepare is not None or not self._plain

    @property
    def finishes(self) -> bool:
        """Whether the model has a method ``finish``."""
        return self._finish is not None

    @property
    def runs_code(self) -> bool:
        return True

    # -- before the device ----------------------------------------------------------------

    def prepare(self, values: Sequence[object]) -> list[Any]:
        """Read and validate each value, then let the model prepare it; a bad one gives an error instead."""
        items: list[Any]
        if self._plain:
            items = list(decode_batch(self.manifest, values))
            if self.signature.named:
                names = [one.name for one in self.signature.inputs]
                items = [
                    item if isinstance(item, Exception) else dict(zip(names, item, strict=True))
                    for item in items
                ]
            else:
                items = [item if isinstance(item, Exception) else item[0] for item in items]
        else:
            items = [self._read(value) for value in values]
        if self._prepare is None:
            return items
        try:
            return [
                item if isinstance(item, Exception) else self._call(self._prepare, item, "prepare")
                for item in items
            ]
        finally:
            end_lines()

    def _read(self, value: object) -> Any:
        try:
            if self.signature.named:
                item: Any = {
                    name: self._readers[name](one, f"inputs.{name}")
                    for name, one in self._by_name(value).items()
                }
                return _with_files(item)
            (read,) = self._readers.values()
            item = read(value, "inputs")
        except GpuinferError as exc:
            return without_trace(exc)
        return _Held(item.path, (item,)) if isinstance(item, TemporaryFile) else item

    def _by_name(self, value: object) -> dict[str, Any]:
        """Return all inputs' values in order. Raises InputError, MissingInput."""
        names = list(self._readers)
        wanted = f"the model's inputs are {', '.join(names)}"
        if not isinstance(value, Mapping):
            raise InputError(f"must map names to values: {wanted}; got {type(value).__name__}", "inputs")
        unknown = sum(key not in self._readers for key in value)
        if unknown:
            raise InputError(f"has {unknown} unknown name{'s' * (unknown > 1)}; {wanted}", "inputs")
        for name in names:
            if name not in value:
                raise MissingInput(f"is missing; {wanted}", f"inputs.{name}")
        return {name: value[name] for name in names}

    def _call(self, method: Callable[[Any], Any], item: Any, name: str) -> Any:
        """Call one of the model's methods for one item; return its error if it fails."""
        held = item.files if isinstance(item, _Held) else ()
        try:
            made = method(item.value if held else item)
        except FAILURES as exc:
            return self._failed(exc, name)
        if isinstance(made, Exception):
            return self._failed(made, name)
        return _Held(made, held) if held else made

    def _failed(self, exc: BaseException, method: str) -> GpuinferError:
        return blame(exc, self._folder, f"{self.name}.{method}", InferenceError)

    # -- on the device --------------------------------------------------------------------

    def example(self) -> Any | None:
        """Return the manifest's example, or else that of the class."""
        given = examples.example(self._model_folder)
        return getattr(self.instance, "example", None) if given is None else given

    def warm_up(self, max_batch_size: int | None = None) -> int:
        """Run the example alone and in a batch; without one, made-up tensors if the manifest describes them.

        Raises ModelLoadError if the model fails on its own example.
        """
        largest = max(1, max_batch_size or self.manifest.max_batch_size) if self.manifest.batchable else 1
        example = self.example()
        tried: Iterable[Candidate] = ()
        if example is not None:
            tried = [Candidate("its example", example, given=True)]
        elif self._plain:
            tried = examples.candidates(self._model_folder)
        with working(Work(model=self.name)):
            size, item = warm_up(self, tried, largest, self._check, runs=1)
        if item is None:
            why = f"it refuses invented inputs ({self.refused})" if self.refused else "it has no example"
            self.refused = self.refused or why
            self.warnings.append(
                f"{why}: it was not warmed up, and batches start at 1 and grow; set example in its class, or "
                "inputs.NAME.example in model.toml"
            )
        return size

    def _check(self, output: Any) -> None:
        (result,) = self.finish([output])
        if isinstance(result, Exception):
            raise OutputMismatch(str(result))

    def forward(self, items: Sequence[Any]) -> list[Any]:
        """Call ``predict`` with all items, or, if it takes no batch, with one after another.

        If it returns an Exception for an item, that item fails. Raises InferenceError if it raises one, or
        returns a list of another length; DeviceOutOfMemory and DeviceError for such errors of torch.
        """
        bare = [item.value if isinstance(item, _Held) else item for item in items]
        try:
            with self._no_grad():
                if self.manifest.batchable:
                    outputs = self._predict(bare)
                else:
                    outputs = [self._predict_one(item) for item in bare]
        finally:
            end_lines()
        outputs = [self._failed(o, "predict") if isinstance(o, Exception) else o for o in outputs]
        return [
            _Held(output, item.files) if isinstance(item, _Held) else output
            for item, output in zip(items, outputs, strict=True)
        ]

    def _predict(self, batch: list[Any]) -> list[Any]:
        outputs = self._run(batch)
        array = as_array(outputs)
        if array is not None:
            outputs = list(array) if array.ndim else None
        if not isinstance(outputs, list | tuple):
            raise InferenceError(
                f"predict must return a list with one output per item, got {type(outputs).__name__}"
            )
        if len(outputs) != len(batch):
            raise InferenceError(
                f"predict returned {len(outputs)} outputs for {len(batch)} items: it must return one for "
                "each, in their order"
            )
        return list(outputs)

    def _predict_one(self, item: Any) -> Any:
        return self._run(item)

    def _run(self, argument: Any) -> Any:
        try:
            if self._before is not None:
                self._before()
            return self.instance.predict(argument)
        except FAILURES as exc:
            raise self._failed(exc, "predict") from exc

    @staticmethod
    def _no_grad() -> AbstractContextManager[Any]:
        """Return a context without gradients, if torch is imported; the model may enable them."""
        torch = sys.modules.get("torch")
        return nullcontext() if torch is None else torch.no_grad()

    # -- after the device -----------------------------------------------------------------

    def finish(
        self,
        outputs: Sequence[Any],
        *,
        top_k: Sequence[int | None] | None = None,
        encoding: Sequence[Encoding] | None = None,
    ) -> list[Any]:
        """Let the model finish each output, then turn it into JSON, as the manifest's outputs say."""
        done: list[Any] = list(outputs)
        if self._finish is not None:
            try:
                done = [self._call(self._finish, output, "finish") for output in done]
            finally:
                end_lines()
        done = [one.value if isinstance(one, _Held) else one for one in done]
        top_k, encoding = top_k or [None] * len(done), encoding or ["list"] * len(done)
        if not self.manifest.outputs:
            return [self._answer(one, how) for one, how in zip(done, encoding, strict=True)]
        rows: list[Any] = [one if isinstance(one, Exception) else self._arrays(one) for one in done]
        good = [i for i, row in enumerate(rows) if not isinstance(row, Exception)]
        rendered = render_batch(
            self.manifest,
            [rows[i] for i in good],
            top_k=[top_k[i] for i in good],
            encoding=[encoding[i] for i in good],
        )
        for i, result in zip(good, rendered, strict=True):
            rows[i] = result
        return rows

    def _answer(self, output: Any, encoding: Encoding) -> Any:
        if isinstance(output, Exception):
            return output
        try:
            return {"output": to_json(output, encoding)}
        except GpuinferError as exc:
            return exc
        except FAILURES as exc:  # an object of the model that cannot be converted
            return self._failed(exc, "output")

    def _arrays(self, output: Any) -> tuple[Array, ...] | GpuinferError:
        """Return one output as the arrays of the manifest's outputs."""
        specs = self.manifest.outputs
        if isinstance(output, Mapping):
            missing = [spec.name for spec in specs if spec.name not in output]
            if missing:
                return InferenceError(f"{self.name} did not return output {missing[0]!r}")
            values = [output[spec.name] for spec in specs]
        else:
            values = list(output) if len(specs) > 1 and isinstance(output, list | tuple) else [output]
        if len(values) != len(specs):
            return InferenceError(
                f"{self.name} returned {len(values)} outputs, but its manifest has {len(specs)}"
            )
        try:
            return tuple(_array_of(value, spec) for value, spec in zip(values, specs, strict=True))
        except (ValueError, TypeError) as exc:
            return InferenceError(f"{self.name} returned an output that is not an array of numbers: {exc}")


def _array_of(value: Any, spec: OutputSpec) -> Array:
    array = as_array(value)
    array = np.asarray(value) if array is None else array
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{spec.name} is {array.dtype.name}")
    if spec.kind == "classification" and array.ndim != 1:
        raise ValueError(f"{spec.name} has shape {list(array.shape)}, but a classification needs a vector")
    return array
