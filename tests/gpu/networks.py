# SPDX-License-Identifier: Apache-2.0
"""The networks of the figures, with random weights: a perceptron, a ResNet-50 and a BERT-base by their sizes.

In a dry run they are the same code with few and narrow layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuinfer.models.tensors import encode_array
from tests.gpu.dry import dry_run
from tests.models_for_tests import perceptron, write_model


class _Bottleneck(nn.Module):
    """Narrow, look, widen, add: He et al. 2015, figure 5."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *_convolution(channels, width, 1, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, 4 * width, 1, 1),
        )
        same = stride == 1 and channels == 4 * width
        self.way_round = (
            nn.Identity() if same else nn.Sequential(*_convolution(channels, 4 * width, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.path(x) + self.way_round(x))


def _convolution(channels: int, width: int, size: int, stride: int) -> list[nn.Module]:
    plain = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
    return [plain, nn.BatchNorm2d(width)]


class ConvNet(nn.Module):
    """Pixels as bytes to 1,000 classes. ResNet-50: ``ConvNet((3, 4, 6, 3), 64)``, 25.6 million weights."""

    def __init__(self, depths: tuple[int, ...], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            *_convolution(3, width, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = width
        for stage, depth in enumerate(depths):
            for place in range(depth):
                stride = 2 if place == 0 and stage else 1
                layers.append(_Bottleneck(channels, width << stage, stride))
                channels = 4 * (width << stage)
        self.features = nn.Sequential(*layers)
        self.classes = nn.Linear(channels, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.features(pixels.float() / 127.5 - 1.0)
        return self.classes(found.mean(dim=[2, 3]))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Attention, then two linear layers, each added to what came and normalised: BERT's block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.three = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size(0), x.size(1), x.size(2)
        three = self.three(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(three[0], three[1], three[2])
        x = self.first(x + self.out(found.transpose(1, 2).reshape(batch, length, width)))
        return self.second(x + self.down(functional.gelu(self.up(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Tokens to the first one's vector. BERT-base: ``Encoder(12, 768, 12)``, 109 million weights."""

    def __init__(self, depth: int, width: int, heads: int, *, words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.words(tokens) + self.places)[:, 0]  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Network:
    """One of the networks, and how it is asked."""

    write: Callable[[Path], Path]
    #: Returns one input as a client sends it.
    one: Callable[[random.Random], Any]
    #: Batch size -> how many items are worked off.
    items: dict[int, int]


SIDE, TOKENS, WORDS = (32, 16, 500) if dry_run() else (224, 128, 30_522)


def _write_convnet(folder: Path) -> Path:
    torch.manual_seed(4)
    model = ConvNet((1, 1), 8) if dry_run() else ConvNet((3, 4, 6, 3), 64)
    tables = f"""
max_batch_size = 64
[[inputs]]
name = "pixels"
dtype = "uint8"
shape = [3, {SIDE}, {SIDE}]
[[outputs]]
name = "class"
kind = "classification"
activation = "softmax"
top_k = 5
"""
    return write_model(folder, model, tables)


def _write_encoder(folder: Path) -> Path:
    torch.manual_seed(5)
    sizes = (2, 32, 4) if dry_run() else (12, 768, 12)
    tables = f"""
max_batch_size = 64
[[inputs]]
name = "tokens"
dtype = "int64"
shape = [{TOKENS}]
[[outputs]]
name = "vector"
"""
    return write_model(folder, Encoder(*sizes, words=WORDS, length=TOKENS), tables)


def _vector(numbers: random.Random) -> list[float]:
    return [round(numbers.uniform(-1, 1), 6) for _ in range(64)]


def _pixels(numbers: random.Random) -> Any:
    """Return an image as bytes, in base64."""
    return encode_array(
        np.frombuffer(numbers.randbytes(3 * SIDE * SIDE), np.uint8).reshape(3, SIDE, SIDE), "b64"
    )


def _tokens(numbers: random.Random) -> list[int]:
    return [numbers.randrange(WORDS) for _ in range(TOKENS)]


def _sizes(one: int, eight: int, all_64: int) -> dict[int, int]:
    """Return how many items for batches of 1, 8 and 64; a dry run has one size, so one worker starts."""
    return {8: 64} if dry_run() else {1: one, 8: eight, 64: all_64}


NETWORKS: dict[str, Network] = {
    "perceptron": Network(write=perceptron, one=_vector, items=_sizes(3_000, 16_000, 48_000)),
    "convnet": Network(write=_write_convnet, one=_pixels, items=_sizes(250, 640, 1_536)),
    "encoder": Network(write=_write_encoder, one=_tokens, items=_sizes(250, 1_200, 2_560)),
}
