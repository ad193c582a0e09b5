# SPDX-License-Identifier: Apache-2.0
"""TorchScript: ``torch.jit.save``'s files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.tensor_model import TensorModel

_SCALARS = ("FloatType", "IntType", "BoolType", "NumberType")


def read(folder: ModelFolder, file: BinaryIO, device: str) -> TensorModel:
    """Load a scripted or traced module onto ``device``, in evaluation mode."""
    import torch

    with warnings.catch_warnings():
        # torch.jit is deprecated, yet it is what most published models are.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(file, map_location=device)  # type: ignore[no-untyped-call]
    module.eval()
    return TensorModel(folder.manifest, device, _unwrapping_scalars(module))


def _unwrapping_scalars(module: Any) -> Callable[..., Any]:
    """Let ``forward(self, x: Tensor, k: float)`` be called with tensors: its ``k`` is taken out."""
    types = [argument.type.kind() for argument in module.forward.schema.arguments[1:]]
    scalars = [kind in _SCALARS for kind in types]
    if not any(scalars):
        return module  # type: ignore[no-any-return]
    return lambda *values: module(*(v.item() if s else v for v, s in zip(values, scalars, strict=True)))
