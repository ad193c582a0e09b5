# SPDX-License-Identifier: Apache-2.0
"""INPUT arguments of ``gpuinfer submit``: JSON text, a .json or .npy file, or ``-``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuinfer.errors import InputError


def read_input(argument: str) -> Any:
    """Return the value an argument stands for. Raises InputError naming the argument."""
    if argument == "-":
        return _parse(sys.stdin.buffer.read(), "standard input")
    if argument.endswith(".npy"):
        return _read_npy(Path(argument))
    if argument.endswith(".json"):
        return _parse(_read(Path(argument)), argument)
    return _parse(argument.encode(), "INPUT")


def read_batch(arguments: Sequence[str]) -> Any:
    """Return the inputs of one job: what a single argument holds must be their list, or an array of them."""
    if len(arguments) > 1:
        return [read_input(argument) for argument in arguments]
    value = read_input(arguments[0])
    if not isinstance(value, list) and not getattr(value, "shape", ()):
        raise InputError("with --batch, a single INPUT must hold the list of inputs", arguments[0][:80])
    return value


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        hint = "; a file must end in .json or .npy" if where == "INPUT" else ""
        raise InputError(f"is not JSON: {exc}{hint}", where) from None
    except (UnicodeDecodeError, RecursionError) as exc:
        raise InputError(f"is not JSON: {exc}", where) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror or exc}", str(path)) from None


def _read_npy(path: Path) -> Any:
    """Return an array. Nothing pickled is opened."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror or exc}", str(path)) from None
    except (ValueError, EOFError) as exc:
        raise InputError(f"is no .npy file: {exc}", str(path)) from None
    if not isinstance(array, np.ndarray):
        raise InputError("is no .npy file but an archive of them", str(path))
    return array
