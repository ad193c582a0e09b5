# SPDX-License-Identifier: Apache-2.0
"""The models that come with the package, and the test images for measuring their accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TEST_IMAGES = Path(__file__).with_name("digits_test.npz")


def load_test_images() -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the held-out digits: images, float32 (N, 1, 8, 8) of 0..16, and labels, int64 (N,) of 0..9.

    They are those of scikit-learn's 1,797 handwritten digits that were not used for training.
    """
    with np.load(TEST_IMAGES, allow_pickle=False) as data:
        return data["images"].astype(np.float32), data["labels"].astype(np.int64)
