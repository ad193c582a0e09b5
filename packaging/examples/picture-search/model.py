# SPDX-License-Identifier: Apache-2.0
"""Score how well a picture matches a text: two inputs by name, both described by annotations.

A request is ``{"picture": FILE, "text": "a ball"}``; for a shell ``-F picture=@ball.png -F text=ball``.
"""

from __future__ import annotations

import base64
import re
from typing import ClassVar, TypedDict
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

WORDS, WIDTH, SIDE = 2048, 32, 32


class Item(TypedDict):
    """What a request holds."""

    picture: Image.Image
    text: str


class Towers(nn.Module):
    """A picture (N, 3, SIDE, SIDE) and the words of a text, all in a row, to their similarity (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(1024, WIDTH)
        )
        self.text = nn.EmbeddingBag(WORDS, WIDTH)

    def forward(self, pictures: Tensor, words: Tensor, starts: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(self.picture(pictures), self.text(words, starts))


class PictureSearch:
    """What gpuinfer calls."""

    # A red dot of 2 x 2 pixels, as a request in JSON carries it.
    example: ClassVar = {
        "picture": {
            "b64": base64.b64encode(b"P6 2 2 255\n" + bytes([255, 0, 0]) * 4).decode(),
            "name": "dot.ppm",
        },
        "text": "a red dot",
    }

    def load(self, ctx):
        """Read the weights onto the worker's device."""
        self.device = ctx.device
        weights = torch.load(ctx.folder / "weights.pt", map_location=ctx.device, weights_only=True)
        self.towers = Towers().to(ctx.device).eval()
        self.towers.load_state_dict(weights)

    def prepare(self, item: Item) -> tuple[Tensor, Tensor]:
        """Turn one picture and one text into tensors."""
        words = [crc32(word.encode()) % WORDS for word in re.findall(r"\w+", item["text"].lower())]
        if not words:
            raise ValueError("the text holds no word")
        pixels = np.asarray(item["picture"].convert("RGB").resize((SIDE, SIDE)), np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor(words)

    def predict(self, batch: list[tuple[Tensor, Tensor]]) -> list[float]:
        """Return the similarity of each picture and its text."""
        pictures, texts = zip(*batch, strict=True)
        starts = torch.tensor([0, *(len(text) for text in texts[:-1])]).cumsum(0)
        likeness = self.towers(
            *(one.to(self.device) for one in (torch.stack(pictures), torch.cat(texts), starts))
        )
        return likeness.tolist()
