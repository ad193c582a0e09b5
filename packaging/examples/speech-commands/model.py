# SPDX-License-Identifier: Apache-2.0
"""Recognise four spoken commands: a spectrogram of each sound, then one pass for the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

RATE, WINDOW, STEP = 16000, 400, 160


def network() -> nn.Sequential:
    """Return a small convolutional network: spectrograms (N, 1, 201, 98) to scores (N, 4)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


class SpeechCommands:
    """What gpuinfer calls."""

    def load(self, ctx):
        """Read the weights onto the worker's device."""
        self.device = ctx.device
        weights = torch.load(ctx.folder / "weights.pt", map_location=ctx.device, weights_only=True)
        self.network = network().to(ctx.device).eval()
        self.network.load_state_dict(weights)

    def prepare(self, item: np.ndarray) -> Tensor:
        """Turn one sound, (1, samples) at 16 kHz, into the spectrogram of its first second."""
        second = np.zeros(RATE, np.float32)
        second[: item.shape[1]] = item[0, :RATE]
        frames = np.lib.stride_tricks.sliding_window_view(second, WINDOW)[::STEP] * np.hanning(WINDOW)
        power = np.abs(np.fft.rfft(frames)) ** 2
        return torch.from_numpy(np.log(power + 1e-6).T.astype(np.float32))[None]

    def predict(self, batch: list[Tensor]) -> list[Tensor]:
        """Return the scores of each sound."""
        return list(self.network(torch.stack(batch).to(self.device)).cpu())
