# SPDX-License-Identifier: Apache-2.0
"""Converts a task's result to the tensors of an answer.

Results have ``encoding="binary"``: each output of a tensor model, and the scores of a classification, is raw
bytes; large ones are not copied. From a Python model's own output each key becomes an output, or the whole
becomes the output ``output``: numbers are FP64 or INT64, text is BYTES, anything else is BYTES with JSON
text.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from gpuinfer.api.oip.inputs import DATATYPES
from gpuinfer.api.oip.requests import BYTES, DTYPES, Array, Tensor, Wanted
from gpuinfer.errors import InferenceError, InputError, from_dict
from gpuinfer.models.signature import Signature
from gpuinfer.queue.arrays import Raw
from gpuinfer.queue.binary import array_of

#: Output name for a Python model that returns a single value.
OUTPUT = "output"
#: Fields that the worker adds to a result.
_ADDED = ("model", "device")
#: One item's value: datatype, shape, data.
_Value = tuple[str, tuple[int, ...], Array | list[bytes]]


def outputs_of(
    result: Any, signature: Signature, items: int | None, wanted: Sequence[Wanted] | None
) -> list[Tensor]:
    """Return the requested tensors of a result, in the order requested.

    ``items``: number of items in the batch; None: the model is not batchable. Raises InputError for an
    unknown output; InferenceError if shapes differ between items; an item's own error.
    """
    entries = result if isinstance(result, list) else [result]
    if len(entries) != (items or 1):
        raise InferenceError(f"the model returned {len(entries)} results for {items or 1} items")
    rows = [_named(_checked(entry, place, len(entries)), signature) for place, entry in enumerate(entries)]
    names = list(rows[0])
    if any(row.keys() != rows[0].keys() for row in rows):
        rows, names = [{OUTPUT: row} for row in rows], [OUTPUT]
    counts = {one.name: one.classes for one in wanted or ()}
    for name in counts:
        if name not in names:
            raise InputError(
                f"is not an output; the model's outputs are {', '.join(names)[:200]}", f"outputs.{name[:80]}"
            )
    return [
        _stacked(name, [_value(row[name], counts.get(name, 0)) for row in rows], batch=items is not None)
        for name in (counts or names)
    ]


def _checked(entry: Any, place: int, items: int) -> Any:
    """Return an item's result; raise its error."""
    if isinstance(entry, Mapping) and isinstance(entry.get("error"), Mapping) and items > 1:
        error = from_dict(dict(entry["error"]))
        error.message = f"item {place} of the batch: {error.message}"
        raise error
    return entry


def _named(entry: Any, signature: Signature) -> dict[str, Any]:
    """Return an item's outputs by name."""
    if not isinstance(entry, Mapping):
        return {OUTPUT: entry}
    bare = {name: value for name, value in entry.items() if name not in _ADDED}
    if isinstance(bare.get("outputs"), Mapping) and signature.outputs:
        return dict(bare["outputs"])
    if signature.outputs:  # a single output, a classification
        return {signature.outputs[0].name: bare}
    answer = bare.get(OUTPUT, bare)
    if isinstance(answer, Mapping) and answer and "b64" not in answer:
        return dict(answer)
    return {OUTPUT: answer}


# -- one item's value -----------------------------------------------------------------------


def _value(value: Any, classes: int) -> _Value:
    if isinstance(value, Raw):
        array = array_of(value)
        return _best(array, classes) if classes else _numbers(array)
    if isinstance(value, Mapping):
        if isinstance(value.get("b64"), memoryview):
            return BYTES, (), [bytes(value["b64"])]
        if value.keys() == {"b64", "dtype", "shape"}:
            return _best(_array(value), classes) if classes else _numbers(_array(value))
        if isinstance(value.get("b64"), str):
            return BYTES, (), [binascii.a2b_base64(value["b64"])]
        if "top_k" in value and classes:
            return _classes((one["confidence"], one["class"], one["label"]) for one in value["top_k"])
    if isinstance(value, str):
        return BYTES, (), [value.encode()]
    found = _plain_numbers(value)
    if found is not None:
        return _best(found, classes) if classes else _numbers(found)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return BYTES, (len(value),), [one.encode() for one in value]
    return BYTES, (), [orjson.dumps(value)]


def _array(value: Mapping[str, Any]) -> Array:
    dtype = np.dtype(value["dtype"]).newbyteorder("<")
    return np.frombuffer(binascii.a2b_base64(value["b64"]), dtype).reshape(value["shape"])


def _numbers(array: Array) -> _Value:
    return DATATYPES[array.dtype.name], array.shape, array


def _plain_numbers(value: Any) -> Array | None:
    """Return a JSON number, or a list of them, as an array; None for any other value."""
    if value is None:
        return np.array(np.nan)
    if not isinstance(value, bool | int | float | list):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    if array.dtype.kind not in "bif" or not array.size:
        return None
    return array


def _classes(best: Iterator[tuple[float | None, int, str]]) -> _Value:
    """Return classes in the format of the protocol's extension: ``value:number:label``."""
    found = [
        f"{'nan' if score is None else f'{score:f}'}:{number}:{label}".encode()
        for score, number, label in best
    ]
    return BYTES, (len(found),), found


def _best(scores: Array, count: int) -> _Value:
    """Return the best scores, without labels, of a model that is not a classifier."""
    flat = scores.reshape(-1)
    order = np.argsort(-flat.astype(np.float64), kind="stable")[:count]
    found = [f"{flat[place]:f}:{place}".encode() for place in order]
    return BYTES, (len(found),), found


def _stacked(name: str, values: Sequence[_Value], *, batch: bool) -> Tensor:
    """Return the values of all items as one tensor."""
    if len({(datatype, shape) for datatype, shape, _ in values}) > 1:
        values = _alike(name, values)
    datatype, shape, first = values[0]
    whole = (len(values), *shape) if batch else shape
    if isinstance(first, list):
        return Tensor(name, datatype, whole, [element for _, _, data in values for element in data])
    if not batch or len(values) == 1:
        return Tensor(name, datatype, whole, np.ascontiguousarray(first).reshape(whole))
    return Tensor(name, datatype, whole, np.stack([data for _, _, data in values]))


def _alike(name: str, values: Sequence[_Value]) -> list[_Value]:
    """Return the values with one common datatype and shape. Raises InferenceError if there is none."""
    shapes = {shape for _, shape, _ in values}
    if len(shapes) == 1 and all(datatype in DTYPES for datatype, _, _ in values):
        arrays = [np.asarray(data, np.float64) for _, _, data in values]
        return [("FP64", array.shape, array) for array in arrays]
    if all(isinstance(data, list) and len(data) == 1 for _, _, data in values):
        return [(BYTES, (), data) for _, _, data in values]
    said = ", ".join(str(list(shape)) for shape in sorted(shapes)[:4])
    raise InferenceError(
        f"output {name[:80]} differs between the items of the batch (shapes {said}); send them one by one"
    )
