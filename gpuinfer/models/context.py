# SPDX-License-Identifier: Apache-2.0
"""A Python model's ``ctx``, and the tasks for which its code currently runs.

``working`` wraps each call into a model. Within it, lines that the model prints or logs get the model's name
and the tasks' ids, and ``ctx.cancelled`` and ``ctx.progress`` refer to those tasks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuinfer.log import bound


def _never() -> bool:
    return False


def _nowhere(_: float) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The tasks for which a model's code runs."""

    model: str
    task_ids: Sequence[str] = ()
    #: Whether all of these tasks were cancelled.
    cancelled: Callable[[], bool] = _never
    #: Called with a fraction from 0 to 1.
    progress: Callable[[float], None] = _nowhere


_current: ContextVar[Work | None] = ContextVar("gpuinfer_work", default=None)


def current() -> Work | None:
    """Return the tasks for which this thread runs a model's code; None outside of it."""
    return _current.get()


@contextmanager
def working(work: Work) -> Iterator[None]:
    """Run a model's code for ``work``."""
    ids = list(dict.fromkeys(work.task_ids))
    tasks: dict[str, object] = {"task_id": ids[0]} if len(ids) == 1 else {"task_ids": ids} if ids else {}
    token = _current.set(work)
    try:
        with bound(model=work.model, **tasks):
            yield
    finally:
        _current.reset(token)


@dataclass(frozen=True, kw_only=True)
class Context:
    """The ``ctx`` of ``load(self, ctx)``. A model may keep it."""

    #: torch's name of the device: ``cpu``, ``cuda``, ``cuda:0``.
    device: str
    #: The model's folder with weights and labels; read-only.
    folder: Path
    #: The manifest's ``[parameters]``.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: A standard logger; its lines go to the journal with the model's name and the tasks' ids.
    log: logging.Logger

    @property
    def cancelled(self) -> bool:
        """True once all current tasks were cancelled; returning early then saves time."""
        work = _current.get()
        return work is not None and work.cancelled()

    def progress(self, fraction: float) -> None:
        """Report the progress of the current tasks, 0 to 1. Raises ValueError for any other number."""
        value = float(fraction)
        if not math.isfinite(value) or not 0 <= value <= 1:
            raise ValueError(f"progress must be a fraction from 0 to 1, got {fraction!r}")
        work = _current.get()
        if work is not None:
            work.progress(value)


def logger_of(model: str) -> logging.Logger:
    """Return the logger of a model's output."""
    return logging.getLogger(f"model.{model}")
