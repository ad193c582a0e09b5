# SPDX-License-Identifier: Apache-2.0
"""Outputs become the JSON that the API promises."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuinfer.models.manifest import Manifest
from gpuinfer.models.outputs import render_batch

pytestmark = pytest.mark.unit


def _manifest(*outputs: dict[str, Any]) -> Manifest:
    inputs = [{"name": "x", "shape": [1]}]
    return Manifest.model_validate({"name": "m", "artefact": "m.pt", "inputs": inputs, "outputs": outputs})


CLASSES = {"name": "c", "kind": "classification", "labels": ["a", "b", "c"], "top_k": 2}


def test_a_classification() -> None:
    """One classification output is the result itself, the best class first."""
    (result,) = render_batch(_manifest(CLASSES), [(np.array([0.25, 0.5, 0.125], np.float32),)])
    assert result == {
        "class": 1,
        "label": "b",
        "confidence": 0.5,
        "top_k": [
            {"class": 1, "label": "b", "confidence": 0.5},
            {"class": 0, "label": "a", "confidence": 0.25},
        ],
    }


def test_softmax() -> None:
    """Logits become confidences that sum to one, however large they are."""
    manifest = _manifest({**CLASSES, "activation": "softmax", "top_k": 3})
    first, second = render_batch(manifest, [(np.array([1e4, 0, 0]),), (np.array([0.0, 0.0, 0.0]),)])
    assert first["confidence"] == 1.0
    assert [row["class"] for row in second["top_k"]] == [0, 1, 2]
    assert second["confidence"] == 0.333333


def test_top_k_is_per_item_and_bounded() -> None:
    """Each request has its own count; none means the manifest's, too many means all."""
    scores = np.array([0.1, 0.2, 0.7])
    results = render_batch(_manifest(CLASSES), [(scores,)] * 4, top_k=[None, 1, 99, 0])
    assert [len(result["top_k"]) for result in results] == [2, 1, 3, 2]


def test_labels_may_be_missing() -> None:
    """A class without a label is called by its number."""
    manifest = _manifest({"name": "c", "kind": "classification"})
    (result,) = render_batch(manifest, [(np.array([[0.1, 0.9]]),)])
    assert (result["class"], result["label"]) == (1, "1")


def test_raw_and_several_outputs() -> None:
    """Several outputs come by name; raw ones as lists or as bytes, a classification as ever."""
    manifest = _manifest(CLASSES, {"name": "features"})
    row = (np.array([0.1, 0.9, 0.0]), np.array([1.5, np.nan], np.float32))
    as_list, as_bytes = render_batch(manifest, [row, row], encoding=["list", "b64"])
    assert as_list["outputs"]["c"]["class"] == 1
    assert as_list["outputs"]["features"] == [1.5, None]
    assert as_bytes["outputs"]["features"] == {"b64": "AADAPwAAwH8=", "dtype": "float32", "shape": [2]}


def test_raw_scores() -> None:
    """As the model gives them, in bytes, beside requests that want classes."""
    manifest = _manifest({**CLASSES, "activation": "softmax"})
    row = (np.array([1.5, -2.0], np.float32),)
    classes, raw = render_batch(manifest, [row, row], encoding=["b64", "raw"])
    assert classes["class"] == 0
    assert raw == {"outputs": {"c": {"b64": "AADAPwAAAMA=", "dtype": "float32", "shape": [2]}}}


def test_nan_scores_are_null_and_never_the_best() -> None:
    """NaN does not win, and is null in JSON."""
    (result,) = render_batch(_manifest({**CLASSES, "top_k": 3}), [(np.array([np.nan, 0.1, 0.9]),)])
    assert [row["class"] for row in result["top_k"]] == [2, 1, 0]
    assert result["top_k"][2]["confidence"] is None
    softmax = _manifest({**CLASSES, "activation": "softmax"})
    (broken,) = render_batch(softmax, [(np.array([np.nan, 0.1, 0.9]),)])
    assert broken["confidence"] is None


def test_an_empty_batch() -> None:
    """Nothing in, nothing out."""
    assert render_batch(_manifest(CLASSES), []) == []


@given(
    scores=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.sampled_from([1, 5, 300, 1000]))),
    count=st.integers(1, 12),
)
def test_the_best_are_the_best(scores: np.ndarray[Any, np.dtype[np.float32]], count: int) -> None:
    """For few classes and for many: sorted, distinct, none left out is better, and it is plain JSON."""
    manifest = _manifest({"name": "c", "kind": "classification"})
    results = render_batch(manifest, [(row,) for row in scores], top_k=[count] * len(scores))
    for row, result in zip(scores, results, strict=True):
        json.dumps(result, allow_nan=False)
        chosen = [entry["class"] for entry in result["top_k"]]
        assert len(set(chosen)) == len(chosen) == min(count, len(row))
        ranks = np.where(np.isnan(row), -np.inf, row)
        assert ranks[chosen].tolist() == sorted(ranks.tolist(), reverse=True)[: len(chosen)]


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-200, 200).map(lambda n: n / 4)),
    st.integers(1, 5),
    st.sampled_from(["softmax", "none"]),
)
def test_alone_as_among_others(
    scores: np.ndarray[Any, np.dtype[np.float32]], count: int, activation: str
) -> None:
    """An item gets the same classes by itself and in a batch; confidences differ by a last digit."""
    manifest = _manifest({"name": "c", "kind": "classification", "top_k": count, "activation": activation})
    (alone,) = render_batch(manifest, [(scores,)])
    among, _ = render_batch(manifest, [(scores,), (scores,)])
    assert [one["class"] for one in alone["top_k"]] == [one["class"] for one in among["top_k"]]
    for one, other in zip(alone["top_k"], among["top_k"], strict=True):
        assert abs(one["confidence"] - other["confidence"]) <= 1.5e-6
