# SPDX-License-Identifier: Apache-2.0
"""Runs a model before it serves: checks that it works, checks its outputs, and finds its largest batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpuinfer.errors import DeviceOutOfMemory, InferenceError, InputError, ModelLoadError
from gpuinfer.models.examples import Candidate
from gpuinfer.models.loaded import LoadedModel

#: TorchScript profiles its first run and compiles in its second; the third is the first at full speed.
RUNS = 3
#: Batch sizes that are tried if a model fails with one item: its batch dimension may be fixed.
_FIXED_BATCHES = (2, 4, 8, 16, 32, 64)
_FIXED_BATCH = (
    "its batch dimension seems to be fixed: export it with an open one (a trace must not turn x.shape[0] "
    "into a number; torch.export takes dynamic_shapes), or set batchable = false and give the full shapes"
)
_PYTHON_BATCH = (
    "predict gets a list of items and must return one of the same length (batchable = false: one item)"
)


class OutputMismatch(InferenceError, code=InferenceError.code):
    """Raised when a model's output is not what its manifest says."""


class _Refused(Exception):
    """Raised when the model fails on a candidate."""


def warm_up(
    model: LoadedModel,
    candidates: Iterable[Candidate],
    largest: int,
    check: Callable[[Any], None],
    runs: int = RUNS,
) -> tuple[int, Any | None]:
    """Run batches of one and of ``largest``, each ``runs`` times.

    ``check`` checks one output; it raises OutputMismatch.

    Returns the largest batch that fits the device's memory (``largest``, or a half, a quarter ... of it),
    and the item that was run: None if the model accepts none of the candidates; the batch is then 1.
    Raises ModelLoadError; DeviceOutOfMemory when not even one item fits.
    """
    tried = list(candidates)
    item, why = _first_taken(model, tried, check)
    if item is None:
        if largest > 1 and tried:
            _refuse_fixed_batch(model, tried[0], why)
        model.refused = why
        return 1, None
    _run(model, item, 1, check, runs - 1)
    while largest > 1:
        try:
            _run(model, item, largest, check, runs)
            break
        except DeviceOutOfMemory:
            largest //= 2
            model.release_cache()
    return largest, item


def _first_taken(
    model: LoadedModel, candidates: Sequence[Candidate], check: Callable[[Any], None]
) -> tuple[Any | None, str]:
    """Return the item of the first candidate that the model accepts, or None and why it refused the first."""
    refused: list[str] = []
    mismatch: OutputMismatch | None = None
    full: DeviceOutOfMemory | None = None
    for candidate in candidates:
        try:
            item = _item(model, candidate)
            check(_outputs(model, [item])[0])
            model.taken = candidate.value
            return item, ""
        except OutputMismatch as exc:
            mismatch = mismatch or exc
        except _Refused as exc:
            if candidate.given:
                raise ModelLoadError(f"{candidate.words} fails: {exc}", model.name) from exc
            refused.append(f"{candidate.words}: {exc}")
        except DeviceOutOfMemory as exc:
            full = full or exc
            model.release_cache()
    if mismatch:
        raise ModelLoadError(f"warm-up failed: {mismatch.message}", model.name) from mismatch
    if full and not refused:
        raise full
    return None, refused[0] if refused else ""


def _item(model: LoadedModel, candidate: Candidate) -> Any:
    (item,) = model.prepare([candidate.value])
    if isinstance(item, InputError | InferenceError):
        raise _Refused(str(item)) from item
    if isinstance(item, Exception):
        raise item
    return item


def _outputs(model: LoadedModel, items: Sequence[Any]) -> list[Any]:
    try:
        outputs = model.forward(items)
    except OutputMismatch:
        raise
    except InferenceError as exc:
        raise _Refused(exc.message.removeprefix(f"{model.name}: ")) from exc
    for output in outputs:
        if isinstance(output, Exception):
            raise _Refused(str(output)) from output
    return outputs


def _run(model: LoadedModel, item: Any, size: int, check: Callable[[Any], None], runs: int) -> None:
    """Run a batch several times, with another one staged, as in service. Raises ModelLoadError."""
    behind = model.stage([item] * size)
    try:
        for _ in range(runs):
            check(_outputs(model, [item] * size)[0])
    except (OutputMismatch, _Refused) as exc:
        raise ModelLoadError(
            f"it accepts one item, but fails with a batch of {size}: {exc.args[0]}; {_batch_hint(model)}",
            model.name,
        ) from exc
    del behind  # its memory had to be in use until here


def _batch_hint(model: LoadedModel) -> str:
    return _PYTHON_BATCH if model.manifest.format == "python" else _FIXED_BATCH


def _refuse_fixed_batch(model: LoadedModel, candidate: Candidate, why: str) -> None:
    """Raise ModelLoadError if the model only accepts batches of one size."""
    for size in _FIXED_BATCHES:
        try:
            _outputs(model, [_item(model, candidate)] * size)
        except (_Refused, OutputMismatch, DeviceOutOfMemory):
            continue
        raise ModelLoadError(
            f"it accepts a batch of {size}, but fails with one item ({why}): {_batch_hint(model)}", model.name
        )
