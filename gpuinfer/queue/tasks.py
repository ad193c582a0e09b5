# SPDX-License-Identifier: Apache-2.0
"""The Celery tasks. In a worker the batcher runs them; the functions here serve direct and eager calls."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from celery import current_task, shared_task

from gpuinfer.errors import GpuinferError, InputError
from gpuinfer.queue.message import BATCH_PREDICT, PREDICT
from gpuinfer.queue.options import Encoding
from gpuinfer.settings import QUEUES, load_settings

if TYPE_CHECKING:
    from gpuinfer.models.loaded import LoadedModel


@cache
def _load(name: str) -> LoadedModel:
    from gpuinfer.models.loader import load
    from gpuinfer.models.repository import Repository

    return load(Repository(load_settings().models.folders).get(name), "cpu")


def _here(inputs: list[Any], model: str | None, top_k: int | None, encoding: Encoding) -> list[Any]:
    """Run inputs in this process on the CPU; the entry of an invalid one is its error.

    For direct and eager calls. A worker calls this only for a task from a queue that is not ours. That is
    refused: a worker must not silently fall back to the CPU.
    """
    request = current_task.request if current_task else None
    if request is not None and not request.called_directly and not request.is_eager:
        raise InputError(f"must be one of {', '.join(QUEUES)}: predictions run only from these", "queue")
    loaded = _load(model or load_settings().worker.models[0])
    return [_one(loaded, item, top_k, encoding) for item in loaded.prepare(inputs)]


def _one(loaded: LoadedModel, item: Any, top_k: int | None, encoding: Encoding) -> Any:
    """Run one prepared item; return its result or its error."""
    if isinstance(item, GpuinferError):
        return item
    (output,) = loaded.forward([item])
    if isinstance(output, GpuinferError):
        return output
    (result,) = loaded.finish([output], top_k=[top_k], encoding=[encoding])
    if isinstance(result, GpuinferError):
        return result
    return {**result, "model": loaded.name, "device": loaded.device}


@shared_task(name=PREDICT)  # type: ignore[untyped-decorator]  # celery is not annotated
def predict(
    inputs: Any, model: str | None = None, top_k: int | None = None, encoding: Encoding = "list"
) -> Any:
    """Run one input through a model.

    ``inputs`` is a nested list, ``{"b64", "dtype", "shape"}``, or a mapping of such by input name.
    """
    (outcome,) = _here([inputs], model, top_k, encoding)
    if isinstance(outcome, GpuinferError):
        raise outcome
    return outcome


@shared_task(name=BATCH_PREDICT)  # type: ignore[untyped-decorator]  # celery is not annotated
def batch_predict(
    inputs: list[Any], model: str | None = None, top_k: int | None = None, encoding: Encoding = "list"
) -> list[Any]:
    """Run a list of inputs; return one entry per input, ``{"error": {...}}`` for one that failed."""
    return [
        {"error": outcome.to_dict()} if isinstance(outcome, GpuinferError) else outcome
        for outcome in _here(inputs, model, top_k, encoding)
    ]
