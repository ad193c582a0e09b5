# SPDX-License-Identifier: Apache-2.0
"""NVML, opened for a few questions: what a board, a driver or our rights do not allow is left out.

Source: https://docs.nvidia.com/deploy/nvml-api
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def opened(nvml: Any) -> Iterator[bool]:
    """Open NVML (the pynvml module), and close it again. Yields False where it cannot be opened."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def answer(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer to one of NVML's functions; None where it raises NVMLError."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None
