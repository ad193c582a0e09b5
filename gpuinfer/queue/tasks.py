# SPDX-License-Identifier: Apache-2.0
"""The tasks by name. A worker's batcher runs them; the bodies serve direct and eager calls."""

from __future__ import annotations

from functools import cache
from typing import Any

from celery import current_task, shared_task

from gpuinfer.errors import GpuinferError, InputError
from gpuinfer.models.tensors import Item
from gpuinfer.queue.message import BATCH_PREDICT, PREDICT
from gpuinfer.queue.options import Encoding
from gpuinfer.settings import QUEUES, load_settings


@cache
def _load(name: str) -> Any:
    from gpuinfer.models.loader import load
    from gpuinfer.models.repository import Repository

    return load(Repository(load_settings().models.folders).get(name), "cpu")


def _here(inputs: list[Any], model: str | None, top_k: int | None, encoding: Encoding) -> list[Any]:
    """Run inputs in this process on the CPU; the entry of a bad one is its error.

    For direct and eager calls. A worker gets here only by a queue that is not ours: it must not
    fall back to the CPU in silence.
    """
    request = current_task.request if current_task else None
    if request is not None and not request.called_directly and not request.is_eager:
        raise InputError(f"predictions run from the queues {', '.join(QUEUES)} alone", "queue")
    from gpuinfer.models.outputs import render_batch
    from gpuinfer.models.tensors import decode_batch

    loaded = _load(model or load_settings().worker.models[0])
    outcomes: list[Any] = []
    for item in decode_batch(loaded.manifest, inputs):
        if isinstance(item, GpuinferError):
            outcomes.append(item)
        else:
            outcomes.append(_one(loaded, item, top_k, encoding, render_batch))
    return outcomes


def _one(loaded: Any, item: Item, top_k: int | None, encoding: Encoding, render: Any) -> Any:
    rendered = render(loaded.manifest, loaded.forward([item]), top_k=[top_k], encoding=[encoding])
    return {**rendered[0], "model": loaded.name, "device": loaded.device}


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
    """Run a list of inputs; return one entry an input, ``{"error": {...}}`` for one that failed."""
    return [
        {"error": outcome.to_dict()} if isinstance(outcome, GpuinferError) else outcome
        for outcome in _here(inputs, model, top_k, encoding)
    ]
