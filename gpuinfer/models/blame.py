# SPDX-License-Identifier: Apache-2.0
"""Whose fault an exception in a model's own code is: the file and line that are named to the caller."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType

from gpuinfer.errors import DeviceError, DeviceOutOfMemory, GpuinferError
from gpuinfer.models.device import translate

#: What a model's code may raise and is the model's failure; an interrupt at a time limit is none of these.
FAILURES = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)
#: Characters of an exception's text that a caller is told.
_MOST = 500


def blame(exc: BaseException, folder: Path, what: str, otherwise: type[GpuinferError]) -> GpuinferError:
    """Return our error for one of a model's: ``what: type: message (file, line N)``.

    The line is the innermost one in the model's ``folder``. Memory that has run out and a failed device are
    DeviceOutOfMemory and DeviceError; all else is ``otherwise``. Its cause is ``exc``, for the journal.
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
    """Return ``type: message`` of any exception, also of one whose own code fails to say it."""
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
    """Let go of the frames that an error holds, and with them of inputs, files and tensors."""
    exc.__traceback__ = exc.__cause__ = exc.__context__ = None
    return exc


def told(exc: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return what the journal shows of an error: the model's own exception where there is one."""
    cause = exc.__cause__ or exc
    return type(cause), cause, cause.__traceback__
