# SPDX-License-Identifier: Apache-2.0
"""A text to a vector: a tokenizer, then a transformer over all texts of a batch, padded to the longest.

The annotation of ``prepare`` describes the input: a text of 1 to 10,000 characters. The API and the clients
refuse anything else before it is queued.
"""

from __future__ import annotations

import re
from typing import Annotated
from zlib import crc32

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

WORDS, WIDTH = 4096, 64


class Encoder(nn.Module):
    """Tokens (N, L) of 1 to WORDS - 1, padded with 0, to vectors (N, WIDTH) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True
        )

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.layer(self.embedding(tokens), src_key_padding_mask=padding)
        mean = hidden.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=1)


def tokenize(text: str) -> list[int]:
    """Return a number for each word: a hash in place of a vocabulary."""
    return [1 + crc32(word.encode()) % (WORDS - 1) for word in re.findall(r"\w+|\S", text.lower())]


class TextEncoder:
    """What gpuinfer calls."""

    example = "gpuinfer runs models that wait in a queue"

    def load(self, ctx):
        """Read the weights onto the worker's device."""
        self.device, self.longest = ctx.device, ctx.parameters["longest"]
        self.encoder = Encoder().to(ctx.device).eval()
        weights = torch.load(ctx.folder / "weights.pt", map_location=ctx.device, weights_only=True)
        self.encoder.load_state_dict(weights)

    def prepare(self, item: Annotated[str, Field(min_length=1, max_length=10_000)]) -> Tensor:
        """Turn one text into tokens."""
        tokens = tokenize(item)[: self.longest]
        if not tokens:
            raise ValueError("holds no word")
        return torch.tensor(tokens)

    def predict(self, batch: list[Tensor]) -> list[Tensor]:
        """Return the vector of each text."""
        padded = pad_sequence(batch, batch_first=True).to(self.device)
        return list(self.encoder(padded).cpu())

    def finish(self, out: Tensor) -> dict[str, list[float]]:
        """Return what the caller reads."""
        return {"vector": [round(number, 6) for number in out.tolist()]}
