# SPDX-License-Identifier: Apache-2.0
"""A photo or scan of one handwritten digit to its class: the weights of the model ``digits``, in Python.

``digits`` wants what its training has seen: 8 x 8 pixels that the strokes fill, bright on dark. Here
``prepare`` makes that of any picture: ink on paper or chalk on a board, of any size, anywhere in the picture.
"""

import numpy as np
import torch
from PIL import Image
from torch import nn

#: Below this share of the strongest stroke it is ground.
STROKE = 0.25
SIDE = 8


def network() -> nn.Sequential:
    """Return the network of ``digits``: (N, 1, 8, 8) of 0..1 to scores (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def found(picture: Image.Image) -> np.ndarray:
    """Return how strong a stroke is at each pixel, 0..1, whatever the colour of the ground is."""
    picture = picture.convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(paper, picture).convert("L")
    picture.thumbnail((512, 512))
    grey = np.asarray(picture, np.float32)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    strokes = np.abs(grey - np.median(border))
    strongest = strokes.max()
    if strongest < 16:
        raise ValueError("shows no digit: all of it has nearly the same brightness")
    return strokes / strongest


def cut_out(strokes: np.ndarray) -> np.ndarray:
    """Return the part with the strokes, square, with the strokes in the middle."""
    rows, columns = (np.flatnonzero((strokes > STROKE).any(axis=axis)) for axis in (1, 0))
    part = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(part.shape)
    square = np.zeros((side, side), np.float32)
    top, left = ((side - length) // 2 for length in part.shape)
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    return square


class Digits:
    """What gpuinfer calls."""

    def load(self, ctx):
        """Read the weights onto the worker's device."""
        self.device = ctx.device
        self.network = network().to(ctx.device).eval()
        with np.load(ctx.folder / "weights.npz", allow_pickle=False) as weights:
            self.network.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})

    def prepare(self, item: Image.Image) -> np.ndarray:
        """Turn one picture into 8 x 8 pixels of 0..1, bright strokes on a dark ground."""
        square = Image.fromarray(cut_out(found(item)))
        return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX))

    def predict(self, batch: list[np.ndarray]) -> list[torch.Tensor]:
        """Return the scores of each picture."""
        images = torch.from_numpy(np.stack(batch)[:, None]).to(self.device)
        return list(self.network(images).cpu())
