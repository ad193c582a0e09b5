# SPDX-License-Identifier: Apache-2.0
"""Examples of a model's inputs: from its manifest, or invented ones to try."""

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

#: What a free dimension is where no length is given: 8 suits most models, wav2vec takes at least 400 samples,
#: U-Nets want multiples of 32, and some speech models a second.
LENGTHS = (8, 64, 512, 4096, 16000)
#: An invented input of more than the shortest length has at most this many numbers.
MAX_INVENTED = 1 << 22


@dataclass(frozen=True)
class Candidate:
    """One ``inputs`` value to test a model with."""

    #: What it is, for a message.
    words: str
    value: Any
    #: True when all of it comes from the manifest.
    given: bool = False


def example(folder: ModelFolder) -> Any | None:
    """Return the example that a manifest gives, as one ``inputs`` value; None when an input has none.

    An array comes as numpy's, a file that is no array, text or JSON as its bytes. Raises ManifestError when
    a file cannot be read.
    """
    values = _given(folder)
    if not values or len(values) < len(folder.manifest.inputs):
        return None
    return _as_inputs(folder.manifest, values)


def candidates(folder: ModelFolder) -> Iterator[Candidate]:
    """Yield what a model of tensors can be tried with: its example alone where it has one.

    Without one, zeros and ones, in several lengths where an input has free dimensions. Inputs that have an
    example keep it. Raises ManifestError when an example's file cannot be read.
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
    """Name the keys of a manifest that would say what the model can be tried with."""
    missing = [spec for spec in manifest.inputs if spec.example is None and spec.example_file is None]
    return ", ".join(f"inputs.{spec.name}.example" for spec in missing)


def sample(folder: ModelFolder) -> Any | None:
    """Return one ``inputs`` value to send to a model: its example, else zeros; None where neither will do."""
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
    """Return the examples that the manifest gives, by input."""
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
    # bfloat16 is none of numpy's: a tensor of it is made from float32.
    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    return np.full(_shape(spec, length), fill, dtype)
