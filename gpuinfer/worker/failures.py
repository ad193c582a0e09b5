# SPDX-License-Identifier: Apache-2.0
"""Reports a model's failures: the traceback to the journal, and to callers what the settings allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuinfer.errors import InferenceError
from gpuinfer.log import get_logger
from gpuinfer.models.blame import told as info_of
from gpuinfer.models.blame import without_trace
from gpuinfer.sections import Errors
from gpuinfer.worker.task import Task

log = get_logger(__name__)

#: Message for callers with ``models.errors = "none"``.
UNTOLD = "the model failed on this input; see the worker's journal"


def told(model: str, tasks: Sequence[Task], outcomes: Sequence[Any], errors: Errors) -> list[Any]:
    """Log each failure of a model once, with its traceback, and return the outcomes for callers.

    Inputs of one batch that failed in the same way share one log entry with the ids of all their tasks.
    """
    alike: dict[str, tuple[InferenceError, list[str]]] = {}
    for task, outcome in zip(tasks, outcomes, strict=True):
        if isinstance(outcome, InferenceError):
            _, ids = alike.setdefault(outcome.message, (outcome, []))
            if task.id not in ids[-1:]:
                ids.append(task.id)
    for error, ids in alike.values():
        whose = {"task_id": ids[0]} if len(ids) == 1 else {"task_ids": ids}
        trace = {"exc_info": info_of(error)} if error.__cause__ is not None else {}
        log.warning("model_failed", model=model, **whose, reason=error.message, **trace)
    answers = []
    for outcome in outcomes:
        answer = outcome
        if isinstance(outcome, InferenceError):
            answer = without_trace(outcome) if errors == "full" else InferenceError(UNTOLD)
        answers.append(answer)
    return answers
