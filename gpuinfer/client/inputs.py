# SPDX-License-Identifier: Apache-2.0
"""Input files: paths given to a client, and the INPUT arguments of ``gpuinfer submit``.

If the kind of the model's input is known, it decides how a file is sent; else the suffix does: ``.npy`` as an
array, ``.json`` as JSON, ``.txt`` as UTF-8 text. Any other file is sent unchanged, with its name.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from gpuinfer.errors import InputError, ShapeMismatch

#: Kind of input -> suffix that decides how a file is sent, regardless of its own.
_SENT_AS = {
    "json": ".json",
    "text": ".txt",
    **dict.fromkeys(("bytes", "image", "audio", "file"), ""),
}


def opened(inputs: Any, *, many: bool, kinds: Mapping[str, str] | None = None) -> Any:
    """Return inputs with each path replaced by its file's content. Raises InputError.

    A path may be the input itself, a value in a dict, or, with ``many``, either of these in each item.
    ``kinds``: name -> kind of the model's inputs, if known; with a single input the name is ignored.
    """
    if many and isinstance(inputs, list | tuple):
        return [_opened(value, kinds or {}) for value in inputs]
    if type(inputs) is list:  # a tensor: numbers, no paths
        return inputs
    return _opened(inputs, kinds or {})


def _opened(value: Any, kinds: Mapping[str, str]) -> Any:
    if isinstance(value, os.PathLike):
        return from_path(Path(value), next(iter(kinds.values())) if len(kinds) == 1 else None)
    if type(value) is dict and any(isinstance(one, os.PathLike) for one in value.values()):
        return {
            name: from_path(Path(one), kinds.get(name)) if isinstance(one, os.PathLike) else one
            for name, one in value.items()
        }
    return value


def from_path(path: Path, kind: str | None = None) -> Any:
    """Return the value to send for a file. Raises InputError naming the path."""
    return from_bytes(_read(path), path, kind)


def from_bytes(data: bytes, path: Path, kind: str | None = None) -> Any:
    """Return the value to send for a file with this content. Raises InputError naming the path."""
    suffix = path.suffix.lower() if kind in (None, "tensor") else _SENT_AS.get(kind, "")
    if suffix == ".npy":
        return _array(data, str(path))
    if suffix == ".json":
        return _parse(data, str(path))
    if suffix == ".txt":
        try:
            return data.decode()
        except UnicodeDecodeError as exc:
            raise InputError(f"is not UTF-8 text: {exc}", str(path)) from None
    return {"b64": data, "name": path.name}


def from_raw(data: bytes, dtype: str, shape: Sequence[int]) -> Any:
    """Return an array from its little-endian bytes in C order; one dimension may be -1 (any length).

    bfloat16, which numpy lacks, is widened to float32. Raises InputError if the number of bytes is wrong.
    """
    import numpy as np

    stored = np.dtype(np.uint16 if dtype == "bfloat16" else dtype).newbyteorder("<")
    fixed = prod(length for length in shape if length >= 0) * stored.itemsize
    free = sum(length < 0 for length in shape)
    fits = len(data) == fixed if not free else free == 1 and fixed and len(data) and len(data) % fixed == 0
    if not fits:
        takes = f"{'a multiple of ' if free == 1 else ''}{fixed} bytes" if free < 2 else "a .npy file or JSON"
        raise ShapeMismatch(
            f"is a file of {len(data)} bytes; shape {list(shape)[:16]} of {dtype} takes {takes}", "inputs"
        )
    array = np.frombuffer(data, stored).reshape(shape)
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def read_input(argument: str) -> Any:
    """Return the JSON value of an argument, or the path of a file. Raises InputError naming the argument."""
    if argument == "-":
        return _from_stdin(sys.stdin.buffer.read())
    if argument.startswith("@"):
        return _path(argument[1:])
    try:
        return json.loads(argument)
    except (json.JSONDecodeError, RecursionError) as exc:
        if argument[:1] in '[{"' or not argument:
            raise InputError(f"is not JSON: {exc}", argument[:80]) from None
    return _path(argument)


def read_field(argument: str) -> tuple[str, Any]:
    """Return the name and value of ``NAME=VALUE``: JSON, text, or a file with ``@``. Raises InputError."""
    name, equals, text = argument.partition("=")
    if not equals or not name:
        raise InputError("must be NAME=VALUE or NAME=@FILE", argument[:80])
    if text.startswith("@"):
        return name, _path(text[1:])
    try:
        return name, json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return name, text


def read_batch(arguments: Sequence[str]) -> Any:
    """Return the inputs of one job. A single argument must hold a list or an array of inputs."""
    if len(arguments) > 1:
        return [read_input(argument) for argument in arguments]
    value = opened(read_input(arguments[0]), many=False)
    if not isinstance(value, list) and not getattr(value, "shape", ()):
        raise InputError("with --batch, a single INPUT must hold the list of inputs", arguments[0][:80])
    return value


def _from_stdin(data: bytes) -> Any:
    """Return the JSON value; binary data counts as a file."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return {"b64": data, "name": ""}
    return _parse(data, "standard input")


def _path(name: str) -> Path:
    path = Path(name)
    try:
        if path.is_file():
            return path
        said = (
            "is a folder; name a file in it"
            if path.is_dir()
            else "is not JSON, and there is no such file (write a text as JSON, in double quotes)"
        )
    except (OSError, ValueError) as exc:  # name too long, or with a null byte
        said = f"is neither JSON nor a file name: {exc}"
    raise InputError(said, name[:80])


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InputError(f"is not JSON: {exc}", where) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror or exc}", str(path)) from None


def _array(data: bytes, where: str) -> Any:
    """Return the array of a .npy file. Pickled objects are refused."""
    import numpy as np

    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise InputError(f"is not a .npy file: {exc}", where) from None
    if not isinstance(array, np.ndarray):
        raise InputError("is a .npz archive; must be a .npy file", where)
    return array
