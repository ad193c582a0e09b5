# SPDX-License-Identifier: Apache-2.0
"""What ``gpuinfer model run`` is given: the ``inputs`` values that a file holds."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpuinfer.errors import InputError, UsageError
from gpuinfer.models.manifest import Manifest


def values_in(manifest: Manifest, source: Path, data: bytes | None) -> list[object]:
    """Return the ``inputs`` values of a file with this content; None: JSON from standard input.

    Raises InputError naming the file; UsageError for what the model cannot take from a file.
    """
    suffix = source.suffix.lower()
    try:
        if data is None:
            return [_unwrapped(json.load(sys.stdin))]
        if suffix == ".json":
            return [_unwrapped(json.loads(data))]
        if suffix == ".npy":
            return _from_npy(manifest, np.load(io.BytesIO(data), allow_pickle=False))
        if suffix == ".txt":
            return [data.decode()]
    except (OSError, ValueError, EOFError, RecursionError) as exc:
        raise InputError(f"cannot be read: {exc}", str(source)) from exc
    return [_from_file(manifest, source, data)]


def _unwrapped(value: object) -> object:
    """Take the body of an API request, ``{"inputs": ...}``, as well as the bare value."""
    return value["inputs"] if isinstance(value, dict) and "inputs" in value else value


def _from_npy(manifest: Manifest, array: np.ndarray[Any, np.dtype[Any]]) -> list[object]:
    if len(manifest.inputs) > 1:
        raise UsageError(f"{manifest.name} has several inputs; give them as JSON", "input")
    known = manifest.inputs and manifest.batchable
    if known and array.ndim == len(manifest.inputs[0].shape) + 1:
        return [array[place, ...] for place in range(len(array))]
    return [array]


def _from_file(manifest: Manifest, source: Path, data: bytes) -> object:
    """Return a file's bytes, for an input that accepts a file. Annotated inputs are checked later."""
    spec = manifest.inputs[0] if len(manifest.inputs) == 1 else None
    if manifest.inputs and (spec is None or (spec.kind == "tensor" and not (spec.image or spec.audio))):
        raise UsageError(
            f"{manifest.name} does not take images (its manifest has no [inputs.image]); give .json or .npy",
            "input",
        )
    return {"b64": data, "name": source.name}
