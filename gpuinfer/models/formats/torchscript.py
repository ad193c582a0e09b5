# SPDX-License-Identifier: Apache-2.0
"""The format TorchScript: files of ``torch.jit.save``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gpuinfer.errors import ModelLoadError
from gpuinfer.models.formats.diagnosis import explain
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.specs import InputSpec
from gpuinfer.models.tensor_model import TensorModel

#: Kind of an argument that is a plain number -> what the dtype of its input must contain.
_NUMBERS = {"FloatType": "float", "IntType": "int", "BoolType": "bool", "NumberType": ""}
_TENSORS = ("TensorType", "AnyType")


def read(folder: ModelFolder, file: BinaryIO, device: str) -> TensorModel:
    """Load a scripted or traced module onto ``device``, in evaluation mode. Raises ModelLoadError."""
    module = open_module(file, folder.artefact, device)
    numbers = _numbers(module, folder.manifest)
    return TensorModel(folder, device, module, numbers=numbers, before_each=_before_each(module, folder))


def open_module(file: BinaryIO, artefact: Path, device: str) -> Any:
    """Return the module in a file, in evaluation mode.

    Raises ModelLoadError if the cause of a failure is known, otherwise torch's error.
    """
    import torch

    try:
        with warnings.catch_warnings():
            # torch.jit is deprecated, but most published models use it.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(file, map_location=device)  # type: ignore[no-untyped-call]
    except Exception as exc:
        cause = explain(file, artefact.name, str(exc), script=True)
        if cause is None:
            raise
        raise ModelLoadError(f"{artefact} is not loaded: {cause}") from exc
    return module.eval()


def _before_each(module: Any, folder: ModelFolder) -> Callable[[], object] | None:
    name = folder.manifest.before_each
    if name is None:
        return None
    method = getattr(module, name, None)
    if not callable(method):
        raise ModelLoadError(f"before_each = {name!r}: the module has no such method")
    return method  # type: ignore[no-any-return]


def _numbers(module: Any, manifest: Manifest) -> tuple[bool, ...]:
    """Tell which inputs ``forward`` takes as plain numbers. Raises ModelLoadError if inputs do not match."""
    arguments = module.forward.schema.arguments[1:]
    required = sum(not argument.has_default_value() for argument in arguments)
    specs = manifest.inputs
    if not required <= len(specs) <= len(arguments):
        takes = ", ".join(f"{argument.name}: {argument.type}" for argument in arguments)
        raise ModelLoadError(
            f"forward takes ({takes}), but the manifest names {len(specs)} inputs: {_names(specs)}; it needs "
            "one for each argument, in this order"
        )
    return tuple(_is_number(argument, spec) for argument, spec in zip(arguments, specs, strict=False))


def _names(specs: Sequence[InputSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _is_number(argument: Any, spec: InputSpec) -> bool:
    kind = argument.type.kind()
    if kind == "OptionalType":
        kind = argument.type.getElementType().kind()
    if kind in _TENSORS:
        return False
    said = f"forward's argument {argument.name} is a {argument.type}"
    if kind not in _NUMBERS:
        raise ModelLoadError(
            f"{said}, but inputs can only be tensors and numbers: script a wrapper module that takes those"
        )
    if spec.shape or _NUMBERS[kind] not in spec.dtype:
        wanted = {"IntType": ' and an integer dtype, such as "int64"', "BoolType": ' and dtype = "bool"'}
        raise ModelLoadError(
            f"{said}, a single number: inputs.{spec.name} must have shape = []{wanted.get(kind, '')}; it has "
            f"shape = {list(spec.shape)} and dtype = {spec.dtype!r}"
        )
    return True
