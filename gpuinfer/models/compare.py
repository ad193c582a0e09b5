# SPDX-License-Identifier: Apache-2.0
"""Checks that a model gives the same result when its example runs again, in a batch, and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gpuinfer.errors import InferenceError
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.padding import longer_items

#: Relative and absolute tolerance for a different order of arithmetic; and for half-precision floats.
_TOLERANCE, _HALF_TOLERANCE = (1e-3, 1e-5), (3e-2, 1e-2)


@dataclass(frozen=True, slots=True)
class Difference:
    """A result that depends on more than its input."""

    #: The run that differed from the first.
    run: Literal["again", "batch", "padded"]
    #: What differed, a likely cause, and what to do.
    message: str

    def to_dict(self) -> dict[str, str]:
        """Return it for JSON."""
        return asdict(self)


def compare(model: LoadedModel, value: object, *, batch_size: int = 4) -> list[Difference]:
    """Run one ``inputs`` value alone, again, in a batch of copies and, if the model pads, beside a longer
    one.

    Returns the differences from the first run. Raises the model's error, and InputError if it refuses the
    value.
    """
    item = _sound(model.prepare([value]))[0]
    first = _results(model, [item])[0]
    found: list[Difference] = []
    said = difference(first, _results(model, [item])[0])
    if said:
        found.append(
            Difference(
                "again",
                f"the example gives a different result when it runs again ({said}): the model keeps state or "
                "is random; before_each names a method that resets it",
            )
        )
    if not model.manifest.batchable:
        return found
    size = min(batch_size, model.manifest.max_batch_size)
    for place, result in enumerate(_results(model, [item] * size) if size > 1 else ()):
        said = difference(first, result)
        if said:
            found.append(
                Difference(
                    "batch",
                    f"the example gives a different result in a batch of {size}, in place {place} ({said}): "
                    "items are not independent; batchable = false runs each alone",
                )
            )
            break
    if model.manifest.variable == "pad" and isinstance(item, tuple):
        found += _padded(model, item, first)
    return found


def _padded(model: LoadedModel, item: Any, first: Any) -> list[Difference]:
    for _, longer in longer_items(model.manifest, item):
        try:
            said = difference(first, _results(model, [item, longer])[0])
        except InferenceError:  # it does not accept that length
            continue
        if said:
            return [
                Difference(
                    "padded",
                    f"the example gives a different result beside a longer item ({said}): the model sees the "
                    'padding; variable = "group" runs items of one length together',
                )
            ]
    return []


def _sound(values: Sequence[Any]) -> list[Any]:
    for value in values:
        if isinstance(value, Exception):
            raise value
    return list(values)


def _results(model: LoadedModel, items: Sequence[Any]) -> list[Any]:
    """Return comparable results: arrays of a tensor model, the output of others."""
    outputs = _sound(model.forward(items))
    if all(isinstance(output, tuple) for output in outputs) and model.manifest.outputs:
        names = [spec.name for spec in model.manifest.outputs]
        if all(isinstance(array, np.ndarray) for output in outputs for array in output):
            return [dict(zip(names, output, strict=True)) for output in outputs]
    return _sound(model.finish(outputs))


def difference(one: Any, other: Any, where: str = "") -> str:
    """Describe the first difference beyond the tolerance; empty if there is none."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return _of_arrays(one, other, where)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return f"{where or 'its keys'}: {sorted(map(str, one))}, then {sorted(map(str, other))}"
        pairs = [(f"{where}.{key}" if where else str(key), one[key], other[key]) for key in one]
        return next((said for at, a, b in pairs if (said := difference(a, b, at))), "")
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where or 'its length'}: {len(one)} values, then {len(other)}"
        numbered = enumerate(zip(one, other, strict=True))
        return next((said for i, (a, b) in numbered if (said := difference(a, b, f"{where}[{i}]"))), "")
    if isinstance(one, float) or isinstance(other, float):
        return _of_arrays(np.asarray(one), np.asarray(other), where)
    return "" if one == other else f"{where + ': ' if where else ''}{_short(one)}, then {_short(other)}"


def _of_arrays(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], where: str) -> str:
    at = f"{where}: " if where else ""
    if one.shape != other.shape:
        return f"{at}shape {list(one.shape)}, then {list(other.shape)}"
    if one.dtype.kind not in "biuf" or other.dtype.kind not in "biuf":
        return (
            "" if np.array_equal(one, other) else f"{at}{_short(one.tolist())}, then {_short(other.tolist())}"
        )
    half = np.float16 in (one.dtype, other.dtype)
    relative, absolute = _HALF_TOLERANCE if half else _TOLERANCE
    exact = one.dtype.kind in "biu" and other.dtype.kind in "biu"
    close = one == other if exact else np.isclose(one, other, rtol=relative, atol=absolute, equal_nan=True)
    if np.all(close):
        return ""
    worst = int(np.argmin(np.atleast_1d(close)))
    return f"{at}{one.reshape(-1)[worst]:g}, then {other.reshape(-1)[worst]:g}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
