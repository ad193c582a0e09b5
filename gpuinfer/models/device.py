# SPDX-License-Identifier: Apache-2.0
"""Chooses and tests the device of a model, and interprets torch's errors about it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpuinfer.errors import DeviceError, DeviceOutOfMemory, GpuinferError

_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")
#: A line that is an exception's, and how TorchScript marks a place in the code.
_CAUSE = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt): ")
_MARK = "<--- HERE"
_DEVICE_FAILURE = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NCCL")


def pick_device(wanted: str = "auto") -> str:
    """Return ``cuda`` or ``cpu``; ``auto`` means the CPU only if there is no GPU at all."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def try_device(device: str) -> None:
    """Run a minimal computation on a device, to test that it works.

    Raises DeviceError with the driver's message; DeviceOutOfMemory if it lacks even that little memory. If
    the device hangs, this does not return.
    """
    import torch

    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except Exception as exc:
        raise translate(exc, DeviceError, f"{device} cannot be used") from exc


def translate(exc: Exception, otherwise: type[GpuinferError], what: str) -> GpuinferError:
    """Convert torch's error to DeviceOutOfMemory, DeviceError, or ``otherwise`` for any other."""
    import torch

    if isinstance(exc, GpuinferError):
        return exc
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)):
        return DeviceOutOfMemory(f"{what}: {first_line(exc)}")
    text = str(exc)
    if any(mark in text for mark in _OUT_OF_MEMORY):
        return DeviceOutOfMemory(f"{what}: {_line_with(text, _OUT_OF_MEMORY)}")
    if any(mark in text for mark in _DEVICE_FAILURE):
        return DeviceError(f"{what}: {_line_with(text, _DEVICE_FAILURE)}")
    said = telling_line(text)
    return otherwise(f"{what}: {said if _CAUSE.match(said) else f'{type(exc).__name__}: {said}'}")


def first_line(exc: BaseException) -> str:
    """Return the first line of an exception, or its class."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0][:500]


def _line_with(text: str, marks: Sequence[str]) -> str:
    """Return the last line with one of ``marks``: behind an error of CUDA's follows advice on debugging."""
    lines = [line.strip() for line in text.splitlines() if any(mark in line for mark in marks)]
    return lines[-1][:500]


def telling_line(text: str) -> str:
    """Return the line of an error's text that names the cause.

    TorchScript puts its trace-back first and the cause last, as ``RuntimeError: ...``; where it compiles, the
    cause stands first, and behind it the code, with a mark under the place.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if _CAUSE.match(line)]
    if causes:
        return causes[-1][:500]
    marked = any(_MARK in line for line in lines)
    return (lines[0 if marked else -1] if lines else "no message")[:500]
