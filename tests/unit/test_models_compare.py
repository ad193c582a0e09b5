# SPDX-License-Identifier: Apache-2.0
"""An example is run again, in a batch and padded: what differs is said, and padding is cut back or said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpuinfer.errors import InputError
from gpuinfer.models.compare import compare, difference
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder
from tests import models_for_tests as build

pytestmark = pytest.mark.unit


def _load(path: Path) -> LoadedModel:
    model = load(ModelFolder(path=path, manifest=load_manifest(path)), "cpu")
    model.warm_up()
    return model


def _tables(shape: str, top: str = "") -> str:
    return f'{top}\n[[inputs]]\nname = "x"\nshape = {shape}\n[[outputs]]\nname = "y"\n'


def runs(model: LoadedModel, value: object) -> list[str]:
    """Return in which runs the value's result differed."""
    return [one.run for one in compare(model, value)]


def test_sound_models(tmp_path: Path) -> None:
    """Nothing is said of models whose items are independent, padded or not."""
    assert compare(_load(build.perceptron(tmp_path / "a")), [0.5] * 64) == []
    assert compare(_load(build.variable(tmp_path / "b", "pad")), [1.0, 2.0]) == []
    assert compare(_load(build.unbatched(tmp_path / "c")), {"x": [[1], [2]], "k": 2.0}) == []


class _State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class _Average(nn.Module):
    """A batch norm that was left in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.size(0)


class _Mean(nn.Module):
    """Padding counts."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def test_what_differs(tmp_path: Path) -> None:
    """State, neighbours and padding are told apart, with the numbers and the key that helps."""
    state = _load(build.write_model(tmp_path / "a", _State(), _tables("[1]")))
    found = compare(state, [1.0])
    assert [one.run for one in found] == ["again", "batch"]
    assert "before_each" in found[0].message
    assert "then" in found[0].to_dict()["message"]
    (batch,) = compare(_load(build.write_model(tmp_path / "b", _Average(), _tables("[1]"))), [1.0])
    assert (batch.run, "y: 1, then 0.25" in batch.message) == ("batch", True)
    pad = _tables("[-1]", 'variable = "pad"')
    (padded,) = compare(_load(build.write_model(tmp_path / "c", _Mean(), pad)), [1.0, 2.0])
    assert (padded.run, "y: 1.5, then 0.75" in padded.message) == ("padded", True)
    with pytest.raises(InputError):
        compare(state, ["x"])


class _Half(nn.Module):
    """Halves a length, as a convolution with a stride does."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2]


class _Tokens(nn.Module):
    """Tokens and their mask to a vector each, and one for all; the mask hides the padding."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        each = torch.stack([x, -x], dim=2) * mask.unsqueeze(2)
        return each, each.sum(dim=1)


TOKENS = """
variable = "pad"
[[inputs]]
name = "x"
shape = [-1]
[[inputs]]
name = "mask"
shape = [-1]
[[outputs]]
name = "each"
[[outputs]]
name = "all"
"""


class _Picture(nn.Module):
    """A picture to one of its size with the sides exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_padding_is_cut_back_or_said(tmp_path: Path) -> None:
    """Whatever dimension follows an input's is cut to the item's own length; other padding is a warning."""
    tokens = _load(build.write_model(tmp_path / "a", _Tokens(), TOKENS))
    assert tokens.warnings == []
    items = tokens.prepare([{"x": [1, 2], "mask": [1, 1]}, {"x": [3], "mask": [1]}])
    (two, _), (one, every) = tokens.forward(items)
    assert (two.shape, one.tolist(), every.tolist()) == ((2, 2), [[3, -3]], [3, -3])
    picture = _load(build.write_model(tmp_path / "b", _Picture(), _tables("[-1, -1]", 'variable = "pad"')))
    wide, high = picture.forward(picture.prepare([[[1, 2, 3]], [[1], [2]]]))
    assert (wide[0].tolist(), high[0].tolist()) == ([[1], [2], [3]], [[1, 2]])
    half = _load(build.write_model(tmp_path / "c", _Half(), _tables("[-1]", 'variable = "pad"')))
    (told,) = half.warnings
    assert "padding is not removed from its outputs y" in told
    assert 'variable = "group"' in told
    assert runs(half, [1.0, 2.0]) == ["padded"]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (1.0, 1.0004, ""),
        (1.0, 1.1, "1, then 1.1"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a[1]: 2, then 3"),
        ({"a": 1}, {"b": 1}, "its keys: ['a'], then ['b']"),
        ([1], [1, 2], "its length: 1 values, then 2"),
        ("x", "y", "'x', then 'y'"),
        (None, None, ""),
        (np.array([1, 2]), np.array([1, 2]), ""),
        (np.zeros(2, np.float16), np.full(2, 0.005, np.float16), ""),
        (np.zeros(2), np.zeros(3), "shape [2], then [3]"),
        (np.array([np.nan]), np.array([np.nan]), ""),
    ],
)
def test_differences(one: Any, other: Any, said: str) -> None:
    """Any JSON and any arrays; floats by what arithmetic in another order explains, all else exactly."""
    assert difference(one, other) == said
