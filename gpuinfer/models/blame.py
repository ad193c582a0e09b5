# SPDX-License-Identifier: Apache-2.0
"""Converts exceptions from a model's code to gpuinfer's errors, with the file and line in the model."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType

from gpuinfer.errors import DeviceError, DeviceOutOfMemory, GpuinferError
from gpuinfer.models.device import translate

#: Exceptions that count as the model's failure; the interrupt at a time limit is not among them.
FAILURES = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)
#: Maximum characters of an exception's text for callers.
_MOST = 500


def blame(exc: BaseException, folder: Path, what: str, otherwise: type[GpuinferError]) -> GpuinferError:
    """Convert a model's exception to an error with the text ``what: type: message (file, line N)``.

    The line is the innermost one in the model's ``folder``. The error is DeviceOutOfMemory, DeviceError, or
    ``otherwise`` for anything else. Its cause is ``exc``, for the journal.
    """
    if isinstance(exc, GpuinferError):
        return exc
    if isinstance(exc, (MemoryError, RuntimeError)) and "torch" in sys.modules:
        error = translate(exc, otherwise, what)
        if isinstance(error, DeviceError | DeviceOutOfMemory):
            error.__cause__ = exc
            return error
    said = described(exc)
    place = location(exc, folder)
    error = otherwise(f"{what}: {said} ({place})" if place else f"{what}: {said}")
    error.__cause__ = exc
    return error


def described(exc: BaseException) -> str:
    """Return ``type: message`` of any exception, even if its __str__ fails."""
    try:
        # A syntax error's own text ends with the place, too.
        text = str((exc.msg if isinstance(exc, SyntaxError) else None) or exc).strip()
    except Exception as failure:
        text = f"its message cannot be read ({type(failure).__name__})"
    text = text if len(text) <= _MOST else f"{text[:_MOST]}…"
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def location(exc: BaseException, folder: Path) -> str:
    """Return ``model.py, line 14``: the innermost line of the model's folder; '' where there is none."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{Path(exc.filename).name}, line {exc.lineno}"
    found = ""
    for frame, line in traceback.walk_tb(exc.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(folder):
            found = f"{file.relative_to(folder)}, line {line}"
    return found


def root(exc: BaseException) -> BaseException:
    """Return the first of an exception's causes; itself without one."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def without_trace(exc: GpuinferError) -> GpuinferError:
    """Drop an error's tracebacks, which would keep inputs, files and tensors in memory."""
    exc.__traceback__ = exc.__cause__ = exc.__context__ = None
    return exc


def told(exc: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return the exception for the journal: the model's own, if there is one."""
    cause = exc.__cause__ or exc
    return type(cause), cause, cause.__traceback__
