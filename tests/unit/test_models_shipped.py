# SPDX-License-Identifier: Apache-2.0
"""The shipped digits are as good as the file beside them says."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gpuinfer.models.loader import load
from gpuinfer.models.repository import SHIPPED, Repository, verify
from gpuinfer.models.shipped import load_test_images
from gpuinfer.models.shipped.train_digits import Split, as_file, photos

pytestmark = pytest.mark.unit

LEAST = {"digits": 0.98, "digits-photo": 0.97}


def classes(name: str, inputs: list[Any]) -> list[int]:
    """Return the class of each input, as the appliance tells it."""
    model = load(Repository([]).get(name), "cpu")
    model.warm_up(4)
    return [result["class"] for result in model.finish(model.forward(model.prepare(inputs)))]


@pytest.mark.parametrize("name", LEAST)
def test_accuracy_is_what_is_written(name: str) -> None:
    """Measured anew on the held-out images, or photos of them: good, and what accuracy.json says."""
    folder = Repository([]).get(name)
    written = json.loads((folder.path / "accuracy.json").read_text())
    assert folder.record is not None
    assert written["sha256"] == folder.record.files[folder.manifest.artefact]
    verify(folder)
    images, labels = load_test_images()
    split = Split(torch.empty(0), torch.empty(0), images.astype(np.uint8), labels.astype(np.uint8))
    found = classes(name, photos(split) if name == "digits-photo" else [*images])
    correct = int((np.array(found) == labels).sum())
    assert len(labels) == written["test_images"] == 360
    assert correct / len(labels) >= LEAST[name]
    # Another machine's arithmetic may tip one image that lies on the edge, another Pillow a photo or two.
    assert abs(correct - written["correct"]) <= 2


def test_artefacts_are_small_and_know_no_machine() -> None:
    """Under 300 KB with all that belongs to them, without the paths of the machine that trained them."""
    for name in LEAST:
        contents = [path.read_bytes() for path in Repository([]).get(name).path.iterdir() if path.is_file()]
        assert sum(map(len, contents)) < 300_000
        for path in (b"/home/", b"/tmp/", b"site-packages"):
            assert not any(path in content for content in contents)


def test_both_models_have_the_same_weights() -> None:
    """A photo's digit is what the digit itself is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: Any = torch.jit.load(SHIPPED / "digits" / "model.pt")  # type: ignore[no-untyped-call]
    with np.load(SHIPPED / "digits-photo" / "weights.npz", allow_pickle=False) as weights:
        found = [weights[name] for name in weights.files]
    for tensor, array in zip(script.state_dict().values(), found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_a_photo_of_each_digit_is_there() -> None:
    """To try the model with: all are told right."""
    photos = [(SHIPPED / "digits-photo" / f"photo-{digit}.jpg").read_bytes() for digit in range(10)]
    assert classes("digits-photo", photos) == list(range(10))


def test_a_picture_without_a_digit_is_its_own_error() -> None:
    """One colour all over: the model says so, and its neighbours have their results."""
    model = load(Repository([]).get("digits-photo"), "cpu")
    blank = as_file(Image.new("L", (30, 40), 200))
    good, bad = model.prepare([(SHIPPED / "digits-photo" / "photo-7.jpg").read_bytes(), blank])
    assert good.shape == (8, 8)
    assert "shows no digit" in str(bad)


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


def test_both_models_answer_in_the_same_form() -> None:
    """A client need not care which of them has answered."""
    digits, photo = (Repository([]).get(name).manifest for name in LEAST)
    assert (digits.format, photo.format) == ("torchscript", "python")
    assert digits.outputs[0].labels == photo.outputs[0].labels
    assert digits.max_batch_size == 256
