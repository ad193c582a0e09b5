# SPDX-License-Identifier: Apache-2.0
"""Converts the tensors of a request to the inputs of a task, by the model's signature.

If the model is batchable, the first dimension of each input is the batch: one item is one input, several are
a list job. Inputs that are not tensors are BYTES, one element per item: text, a file's bytes, or JSON text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from gpuinfer.api.oip.requests import BF16, BYTES, DTYPES, Tensor
from gpuinfer.errors import DtypeMismatch, InputError, MissingInput, ShapeMismatch
from gpuinfer.models.signature import Input, Signature
from gpuinfer.models.specs import FREE, shape_fits
from gpuinfer.queue.bodies import check_items

#: Name of a dtype -> datatype.
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()} | {"bfloat16": BF16}
#: Kind of the model's dtype -> kinds of datatypes that the worker converts to it.
_KINDS = {"bool": ("BOOL",), "int": ("INT", "UINT"), "float": ("INT", "UINT", "FP", "BF")}


class Inputs(NamedTuple):
    """The inputs to submit."""

    #: One input, or with ``many`` a list or an array of inputs.
    value: Any
    many: bool
    #: Number of items in the batch; None: the model is not batchable.
    items: int | None


def inputs_of(tensors: Sequence[Tensor], signature: Signature, max_items: int) -> Inputs:
    """Return a task's inputs. ``max_items``: maximum items of one request.

    Raises InputError, ShapeMismatch, DtypeMismatch, MissingInput, PayloadTooLarge.
    """
    wanted = {one.name: one for one in signature.inputs}
    given = {one.name: one for one in tensors}
    names = f"the model's inputs are {', '.join(wanted)}"
    for name in given:
        if name not in wanted:
            raise InputError(f"is not an input; {names}", f"inputs.{name[:80]}")
    for name in wanted:
        if name not in given:
            raise MissingInput(f"is missing; {names}", f"inputs.{name}")
    items = _items(tensors, max_items) if signature.batchable else None
    columns = {name: _column(given[name], one, items, f"inputs.{name}") for name, one in wanted.items()}
    if not signature.named:
        (only,) = columns.values()
        if items is None or items == 1:
            return Inputs(only[0] if isinstance(only, list) else only[0, ...], False, items)
        return Inputs(only, True, items)
    rows = [
        {name: column[i] if isinstance(column, list) else column[i, ...] for name, column in columns.items()}
        for i in range(items or 1)
    ]
    return Inputs(rows[0], False, items) if len(rows) == 1 else Inputs(rows, True, items)


def _items(tensors: Sequence[Tensor], max_items: int) -> int:
    """Return the length of the batch."""
    for one in tensors:
        if not one.shape:
            raise ShapeMismatch("has shape []; its first dimension must be the batch", f"inputs.{one.name}")
    lengths = {one.shape[0] for one in tensors}
    if len(lengths) > 1:
        said = ", ".join(f"{one.name}: {one.shape[0]}" for one in tensors)
        raise ShapeMismatch(f"differ in their batch, the first dimension ({said[:200]})", "inputs")
    (items,) = lengths
    if items < 1:
        raise ShapeMismatch("the batch must have at least 1 item, got 0", "inputs")
    check_items(items, max_items)
    return items


def _column(tensor: Tensor, wanted: Input, items: int | None, field: str) -> Any:
    """Return an input's values: a list, or an array with the batch (1 if not batchable) as first
    dimension."""
    if isinstance(tensor.data, list):
        return _elements(tensor, wanted, items, field)
    if wanted.kind in ("text", "bytes", "file"):
        raise DtypeMismatch(f"is {tensor.datatype}, the model wants BYTES", f"{field}.datatype")
    array = tensor.data if items is not None else tensor.data[None, ...]
    if wanted.kind == "json":
        return array.tolist()
    if wanted.kind == "tensor":
        _check(tensor, wanted, items, field)
    return array


def _check(tensor: Tensor, wanted: Input, items: int | None, field: str) -> None:
    """Raises ShapeMismatch, DtypeMismatch. List jobs are not checked elsewhere before they are queued."""
    shape = tensor.shape if items is None else tensor.shape[1:]
    if wanted.shape is not None and not shape_fits(shape, wanted.shape):
        whole = list(wanted.shape) if items is None else [FREE, *wanted.shape]
        batch = "" if items is None else "; the first is the batch"
        raise ShapeMismatch(
            f"has shape {list(tensor.shape)}, the model wants {whole} (-1: any length{batch})",
            f"{field}.shape",
        )
    if wanted.dtype is None:
        return
    kind = next((kind for kind in _KINDS if kind in wanted.dtype), "")
    if kind and not tensor.datatype.startswith(_KINDS[kind]):
        raise DtypeMismatch(
            f"is {tensor.datatype}, the model wants {DATATYPES[wanted.dtype]}", f"{field}.datatype"
        )


def _elements(tensor: Tensor, wanted: Input, items: int | None, field: str) -> list[Any]:
    """Return the values of BYTES elements, one per item."""
    assert isinstance(tensor.data, list)  # noqa: S101  checked by the caller
    if wanted.kind == "tensor" and wanted.file is None:
        dtype = DATATYPES.get(wanted.dtype or "", "numbers")
        raise DtypeMismatch(f"is {BYTES}, the model wants {dtype}", f"{field}.datatype")
    if len(tensor.data) != (items or 1) or len(tensor.shape) > 2:
        shape = "[] or [1]" if items is None else f"[{items}] or [{items}, 1]"
        raise ShapeMismatch(
            f"has shape {list(tensor.shape)}; the model takes one element per item: {shape}", f"{field}.shape"
        )
    if wanted.kind == "text":
        return [_text(one, field) for one in tensor.data]
    if wanted.kind == "json":
        return [_json(one, field) for one in tensor.data]
    return [{"b64": one, "name": ""} for one in tensor.data]


def _text(element: bytes, field: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as exc:
        raise InputError(f"is not UTF-8 text: {exc.reason} at byte {exc.start}", field) from None


def _json(element: bytes, field: str) -> Any:
    try:
        return orjson.loads(element)
    except orjson.JSONDecodeError as exc:
        raise InputError(f"each element must be JSON text: {exc.msg}", field) from None
