# SPDX-License-Identifier: Apache-2.0
"""Classify photos into four classes: crop, scale and normalise each photo, then one pass for the batch."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network() -> nn.Sequential:
    """Return a small convolutional network: (N, 3, side, side) to scores (N, 4)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class ImageClassifier:
    """What gpuinfer calls."""

    def load(self, ctx):
        """Read the weights onto the worker's device."""
        self.device, self.side = ctx.device, ctx.parameters["side"]
        weights = torch.load(ctx.folder / "weights.pt", map_location=ctx.device, weights_only=True)
        self.network = network().to(ctx.device).eval()
        self.network.load_state_dict(weights)

    def prepare(self, item: Image.Image) -> Tensor:
        """Turn one photo into a tensor. Several run at once, while the device runs the previous batch."""
        square = ImageOps.fit(item.convert("RGB"), (self.side, self.side))
        pixels = np.asarray(square, np.float32) / 255
        return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)

    def predict(self, batch: list[Tensor]) -> list[Tensor]:
        """Return the scores of each photo."""
        return list(self.network(torch.stack(batch).to(self.device)).cpu())
