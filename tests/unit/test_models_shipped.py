# SPDX-License-Identifier: Apache-2.0
"""The shipped digits are as good as the file beside them says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gpuinfer.models.loader import load
from gpuinfer.models.outputs import render_batch
from gpuinfer.models.repository import SHIPPED, Repository
from gpuinfer.models.shipped import load_test_images

pytestmark = pytest.mark.unit

FORMATS = ["digits", "digits-export"]


@pytest.mark.parametrize("name", FORMATS)
def test_accuracy_is_what_is_written(name: str) -> None:
    """Measured anew on the held-out images: at least 98 %, and what accuracy.json says."""
    folder = Repository([]).get(name)
    written = json.loads((folder.path / "accuracy.json").read_text())
    assert written["sha256"] == folder.manifest.sha256
    images, labels = load_test_images()
    model = load(folder, "cpu")
    model.warm_up(4)
    results = render_batch(folder.manifest, model.forward([(image,) for image in images]))
    correct = int((np.array([result["class"] for result in results]) == labels).sum())
    assert len(labels) == written["test_images"] == 360
    assert correct / len(labels) >= 0.98
    # Another machine's arithmetic may tip one image that lies on the edge.
    assert abs(correct - written["correct"]) <= 1


@pytest.mark.parametrize("name", FORMATS)
def test_artefacts_are_small_and_know_no_machine(name: str) -> None:
    """Under 300 KB, without the paths of the machine that trained them."""
    content = Repository([]).get(name).artefact.read_bytes()
    assert len(content) < 300_000
    for path in (b"/home/", b"/tmp/", b"site-packages", b"train_digits.py"):
        assert path not in content


def test_both_formats_give_the_same() -> None:
    """The two artefacts hold the same weights."""
    images, _ = load_test_images()
    items = [(image,) for image in images[:50]]
    script, export = (load(Repository([]).get(name), "cpu").forward(items) for name in FORMATS)
    for (left,), (right,) in zip(script, export, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_test_images_are_scikit_learns_own() -> None:
    """They are 360 of the real 1,797, 36 a class but for rounding, with their right labels."""
    images, labels = load_test_images()
    assert images.shape == (360, 1, 8, 8)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert (images.min(), images.max()) == (0, 16)
    assert set(np.bincount(labels)) <= {35, 36, 37}
    digits = load_digits()
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
    for image, label in zip(images, labels, strict=True):
        assert known[image.astype(np.float64).tobytes()] == label


def test_the_manifests_differ_in_the_artefact_alone() -> None:
    """One model in two formats: a client need not care which."""
    script, export = (Repository([]).get(name).manifest for name in FORMATS)
    own = {"name", "artefact", "sha256"}
    assert script.model_dump(exclude=own) == export.model_dump(exclude=own)
    assert (script.format, export.format) == ("torchscript", "export")
    assert script.max_batch_size == 256
    assert sorted(path.name for path in (SHIPPED / "digits").iterdir()) == [
        "accuracy.json",
        "model.pt",
        "model.toml",
    ]
