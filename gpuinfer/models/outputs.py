# SPDX-License-Identifier: Apache-2.0
"""Turns output arrays into the JSON of results, a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from gpuinfer.models.manifest import Manifest
from gpuinfer.models.specs import OutputSpec
from gpuinfer.models.tensors import Array, Encoding, encode_array

#: Encodings in which the scores of a classification are a raw output, too.
_RAW: frozenset[Encoding] = frozenset({"raw", "binary"})
#: Decimal places of a confidence.
CONFIDENCE_DIGITS = 6
#: Up to this many classes, all are sorted; with more, the best are selected first.
_SORT_ALL = 256
#: A single item with up to this many classes is classified without numpy.
_BY_HAND = 64


def render_batch(
    manifest: Manifest,
    outputs: Sequence[tuple[Array, ...]],
    *,
    top_k: Sequence[int | None] | None = None,
    encoding: Sequence[Encoding] | None = None,
) -> list[dict[str, Any]]:
    """Render each item's outputs.

    A model whose one output is a classification gives ``{"class", "label", "confidence", "top_k"}``;
    any other gives ``{"outputs": {name: ...}}``, where a classification is that same dictionary and a
    raw output is ``encode_array``'s. ``top_k`` (None: the manifest's; at least 1, at most all classes)
    and ``encoding`` (default ``list``; ``raw``: scores are a raw output, too) are per item.
    """
    if not outputs:
        return []
    wanted = top_k or [None] * len(outputs)
    encodings: Sequence[Encoding] = encoding or ["list"] * len(outputs)
    columns: list[list[Any]] = [
        _column(spec, column, wanted, encodings)
        for spec, column in zip(manifest.outputs, zip(*outputs, strict=True), strict=True)
    ]
    names = [spec.name for spec in manifest.outputs]
    rows = zip(*columns, strict=True)
    if len(columns) == 1 and manifest.outputs[0].kind == "classification":
        if _RAW.isdisjoint(encodings):
            return columns[0]
        return [
            {"outputs": {names[0]: row[0]}} if how in _RAW else row[0]
            for row, how in zip(rows, encodings, strict=True)
        ]
    return [{"outputs": dict(zip(names, row, strict=True))} for row in rows]


def _column(
    spec: OutputSpec, column: Sequence[Array], top_k: Sequence[int | None], encodings: Sequence[Encoding]
) -> list[Any]:
    """Render one output of all items."""
    if spec.kind == "classification" and _RAW.isdisjoint(encodings):
        return _classified(spec, column, top_k)
    return [
        _classified(spec, [array], [k])[0]
        if spec.kind == "classification" and how not in _RAW
        else encode_array(array, how)
        for array, k, how in zip(column, top_k, encodings, strict=True)
    ]


def _classified(
    spec: OutputSpec, column: Sequence[Array], top_k: Sequence[int | None]
) -> list[dict[str, Any]]:
    sizes = {array.size for array in column}
    if len(sizes) > 1:  # a free number of classes: each item separately
        return [_classified(spec, [a], [k])[0] for a, k in zip(column, top_k, strict=True)]
    classes = sizes.pop()
    if len(column) == 1 and classes <= _BY_HAND:
        alone = _classified_alone(spec, column[0].reshape(-1).tolist(), top_k[0])
        if alone is not None:
            return [alone]
    scores = np.concatenate([array.reshape(1, classes) for array in column]).astype(np.float64, copy=False)
    if spec.activation == "softmax":
        scores = _softmax(scores)
    counts = [min(max(1, k or spec.top_k), classes) for k in top_k]
    best = _best(scores, max(counts))
    confidence = np.take_along_axis(scores, best, axis=1).round(CONFIDENCE_DIGITS)
    labels = spec.labels or [str(number) for number in range(classes)]
    rows = zip(best.tolist(), _numbers(confidence), counts, repeat(labels))
    return [_result(*row) for row in rows]


def _classified_alone(spec: OutputSpec, scores: list[float], top_k: int | None) -> dict[str, Any] | None:
    """Classify one item without numpy, which takes four times as long for ten numbers.

    Returns None if a score is not finite.
    """
    if not all(map(math.isfinite, scores)):
        return None
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: max(1, top_k or spec.top_k)]
    if spec.activation == "softmax":
        peak = scores[best[0]]
        exponentials = [math.exp(score - peak) for score in scores]
        total = math.fsum(exponentials)
        scores = [value / total for value in exponentials]
    labels = spec.labels or [str(number) for number in range(len(scores))]
    confidence: list[float | None] = [round(scores[number], CONFIDENCE_DIGITS) for number in best]
    return _result(best, confidence, len(best), labels)


def _result(
    best: list[int], confidence: list[float | None], count: int, labels: Sequence[str]
) -> dict[str, Any]:
    ranked = [
        {"class": number, "label": labels[number], "confidence": value}
        for number, value in zip(best[:count], confidence, strict=False)
    ]
    return {**ranked[0], "top_k": ranked}


def _softmax(scores: Array) -> Array:
    """Return the softmax of each row. Scores are shifted by the maximum, so that no exponential overflows."""
    with np.errstate(invalid="ignore"):  # a row with NaN or infinity becomes NaN, and then null
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        normal: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normal


def _best(scores: Array, count: int) -> Array:
    """Return the indices of each row's ``count`` largest, in falling order; equal ones in their own order."""
    # Sorting the negatives in ascending order keeps equal ones in order, and puts NaN last.
    falling = -scores
    if scores.shape[1] <= _SORT_ALL:
        return falling.argsort(axis=1, kind="stable")[:, :count]
    picked = np.sort(falling.argpartition(count - 1, axis=1)[:, :count], axis=1)
    order = np.take_along_axis(falling, picked, axis=1).argsort(axis=1, kind="stable")
    return np.take_along_axis(picked, order, axis=1)


def _numbers(values: Array) -> list[list[float | None]]:
    """Return the rows as lists, with None for NaN and infinity, which JSON does not have."""
    rows: list[list[float | None]] = values.tolist()
    if np.isfinite(values).all():
        return rows
    return [[v if v is not None and np.isfinite(v) else None for v in row] for row in rows]
