# SPDX-License-Identifier: Apache-2.0
"""The format torch.export: files of ``torch.export.save``."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gpuinfer.errors import ModelLoadError
from gpuinfer.models.formats.diagnosis import explain
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.specs import InputSpec
from gpuinfer.models.tensor_model import TensorModel


def read(folder: ModelFolder, file: BinaryIO, device: str) -> TensorModel:
    """Load an exported program onto ``device``. Raises ModelLoadError."""
    import torch
    from torch.export.passes import move_to_device_pass

    program = open_program(file, folder.artefact)
    if any(value.device.type != torch.device(device).type for value in program.state_dict.values()):
        program = move_to_device_pass(program, device)
    call, numbers = _bound(program, folder.manifest)
    return TensorModel(folder, device, call, numbers=numbers)


def open_program(file: BinaryIO, artefact: Path) -> Any:
    """Return the program in a file.

    Raises ModelLoadError if the cause of a failure is known, otherwise torch's error.
    """
    import torch

    with _overhearing() as said:
        try:
            return torch.export.load(file)
        except Exception as exc:
            words = "\n".join([*said, str(exc)])
            cause = explain(file, artefact.name, words, script=False)
            if cause is None:
                raise
            raise ModelLoadError(f"{artefact} is not loaded: {cause}") from exc


@contextmanager
def _overhearing() -> Iterator[list[str]]:
    """Collect torch.export's log messages: they have the cause of a failure, which its error lacks."""
    said: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        said.append(f"{record.getMessage()}\n{trace}")
        return False

    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.export.pt2_archive._package")]
    for logger in loggers:
        logger.addFilter(listen)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(listen)


def _bound(program: Any, manifest: Manifest) -> tuple[Callable[..., Any], tuple[bool, ...]]:
    """Return a function that takes one value per input, and which of them are plain numbers.

    It adds arguments that the export has fixed, and assembles nested ones. Raises ModelLoadError if the
    manifest's inputs do not match the program's.
    """
    import torch
    from torch.export.graph_signature import ConstantArgument, InputKind, SymIntArgument
    from torch.utils import _pytree as pytree

    arguments = [
        spec.arg for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT
    ]
    open_ = [argument for argument in arguments if not isinstance(argument, ConstantArgument)]
    fixed = {a.name: a.value for a in arguments if isinstance(a, ConstantArgument)}
    for spec in manifest.inputs:
        if spec.name in fixed:
            raise ModelLoadError(
                f"inputs.{spec.name}: the export has fixed {spec.name} at {fixed[spec.name]!r}: leave this "
                "input out of the manifest, or export a module that takes it as a tensor"
            )
    if len(open_) != len(manifest.inputs):
        raise ModelLoadError(
            f"the program takes {len(open_)} inputs ({', '.join(a.name for a in open_)}), and the manifest "
            f"names {len(manifest.inputs)}: {', '.join(spec.name for spec in manifest.inputs)}"
        )
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for argument, spec in zip(open_, manifest.inputs, strict=True):
        value = values.get(argument.name)
        if isinstance(value, torch.Tensor):
            _check(value, argument.name, spec, manifest, program.range_constraints)
    module = program.module()
    numbers = tuple(isinstance(argument, SymIntArgument) for argument in open_)
    positional, named = program.call_spec.in_spec.children()
    if not fixed and not named.num_leaves and all(child.is_leaf() for child in positional.children()):
        return module, numbers

    def call(*given: Any) -> Any:
        left = iter(given)
        leaves = [fixed[a.name] if a.name in fixed else next(left) for a in arguments]
        args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
        return module(*args, **kwargs)

    return call, numbers


def _check(value: Any, name: str, spec: InputSpec, manifest: Manifest, bounds: Mapping[Any, Any]) -> None:
    """Compare one input with the exported program. Raises ModelLoadError."""
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise ModelLoadError(
            f"inputs.{spec.name}.dtype = {spec.dtype!r}: the program was exported for {dtype}"
        )
    lengths = list(value.shape)
    if len(lengths) != len(spec.shape) + manifest.batchable:
        batch = ", of which the first is the batch" if manifest.batchable else ""
        raise ModelLoadError(
            f"inputs.{spec.name}.shape = {list(spec.shape)}: the program takes {len(lengths)} dimensions"
            f"{batch}"
        )
    if not manifest.batchable or manifest.max_batch_size == 1:
        return
    if not isinstance(lengths[0], int):
        found = bounds.get(lengths[0].node.expr)
        if found is not None and found.upper < manifest.max_batch_size:
            raise ModelLoadError(
                f"max_batch_size = {manifest.max_batch_size}: the program was exported for batches of "
                f"at most {found.upper}"
            )
    else:
        raise ModelLoadError(
            f"its batch dimension was fixed at {lengths[0]} when it was exported: export it with "
            f"dynamic_shapes = {{{name!r}: {{0: torch.export.Dim('batch')}}}} and an example of two or more "
            f"items, or set batchable = false and shape = {[lengths[0], *spec.shape]}"
        )
