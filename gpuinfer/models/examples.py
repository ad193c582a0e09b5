# SPDX-License-Identifier: Apache-2.0
"""Examples of a model's inputs: from its manifest, or made up to try."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gpuinfer.errors import InputError, ManifestError
from gpuinfer.models.images import image_to_array
from gpuinfer.models.manifest import MANIFEST_FILE, Manifest
from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.specs import FREE, InputSpec

#: Lengths to try for a free dimension: 8 suits most models, wav2vec needs at least 400 samples, U-Nets need
#: multiples of 32, and some speech models need a second of sound.
LENGTHS = (8, 64, 512, 4096, 16000)
#: Maximum numbers in a made-up input, unless it has the shortest length.
MAX_INVENTED = 1 << 22


@dataclass(frozen=True)
class Candidate:
    """One ``inputs`` value to test a model with."""

    #: A description for messages.
    words: str
    value: Any
    #: True when all of it comes from the manifest.
    given: bool = False


def example(folder: ModelFolder) -> Any | None:
    """Return the manifest's example, as one ``inputs`` value; None if an input has none.

    An array is returned as a numpy array; a file that is not an array, text or JSON as its bytes. Raises
    ManifestError if a file cannot be read.
    """
    values = _given(folder)
    if not values or len(values) < len(folder.manifest.inputs):
        return None
    return _as_inputs(folder.manifest, values)


def candidates(folder: ModelFolder) -> Iterator[Candidate]:
    """Yield inputs to try a tensor model with: only its example, if it has one.

    Otherwise zeros and ones, of several lengths if an input has free dimensions; an input with an example
    keeps that. Raises ManifestError if an example's file cannot be read.
    """
    manifest, values = folder.manifest, _given(folder)
    missing = [spec for spec in manifest.inputs if spec.name not in values]
    if not missing:
        yield Candidate("its example", _as_inputs(manifest, values), given=True)
        return
    free = any(not spec.fixed and spec.warm_up_length is None for spec in missing)
    for length in LENGTHS if free else LENGTHS[:1]:
        if length > LENGTHS[0] and max(_size(spec, length) for spec in missing) > MAX_INVENTED:
            return
        for fill in (0, 1):
            invented = {spec.name: _filled(spec, fill, length) for spec in missing}
            words = ("zeros", "ones")[fill] + (f" of length {length}" if free else "")
            yield Candidate(words, _as_inputs(manifest, {**values, **invented}))


def keys_to_set(manifest: Manifest) -> str:
    """Return the names of the manifest's keys to set, so that the model has an example."""
    missing = [spec for spec in manifest.inputs if spec.example is None and spec.example_file is None]
    return ", ".join(f"inputs.{spec.name}.example" for spec in missing)


def sample(folder: ModelFolder) -> Any | None:
    """Return an ``inputs`` value to send to a model: its example, or else zeros; None if it has neither."""
    given = example(folder)
    if given is not None or not folder.manifest.inputs:
        return given
    if any(spec.kind != "tensor" for spec in folder.manifest.inputs):
        return None
    return next(candidates(folder)).value


def _as_inputs(manifest: Manifest, values: dict[str, Any]) -> Any:
    if len(manifest.inputs) == 1:
        return values[manifest.inputs[0].name]
    return {spec.name: values[spec.name] for spec in manifest.inputs}


def _given(folder: ModelFolder) -> dict[str, Any]:
    """Return the manifest's examples, by input."""
    values: dict[str, Any] = {}
    for spec in folder.manifest.inputs:
        if spec.example is not None:
            values[spec.name] = spec.example
        elif spec.example_file is not None:
            values[spec.name] = _read(folder.path, spec, spec.example_file)
    return values


def _read(folder: Path, spec: InputSpec, name: str) -> Any:
    """Read an example's file, by its suffix."""
    path = folder / name
    try:
        if path.suffix == ".json":
            return json.loads(path.read_bytes())
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8")
        return image_to_array(path, spec) if spec.image else path.read_bytes()
    except (OSError, ValueError, EOFError, RecursionError, InputError) as exc:
        field = str(folder / MANIFEST_FILE)
        raise ManifestError(f"inputs.{spec.name}.example_file = {name!r}: {exc}", field) from exc


def _shape(spec: InputSpec, length: int) -> tuple[int, ...]:
    return tuple((spec.warm_up_length or length) if want == FREE else want for want in spec.shape)


def _size(spec: InputSpec, length: int) -> int:
    return prod(_shape(spec, length))


def _filled(spec: InputSpec, fill: int, length: int) -> Any:
    # numpy has no bfloat16: such a tensor is made from float32.
    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    return np.full(_shape(spec, length), fill, dtype)
