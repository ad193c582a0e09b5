# SPDX-License-Identifier: Apache-2.0
"""``model.toml`` is written from what a file tells; what it does not tell is asked for by name."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuinfer.errors import ModelLoadError, UsageError
from gpuinfer.models.described import describe
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.repository import name_of
from gpuinfer.models.scaffold import Ask, Wanted, artefact_in, manifest_text
from tests import models_for_tests as build

pytestmark = pytest.mark.unit


class _Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.last(self.pool(self.first(image)).flatten(1))
        return scores


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 8)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mean": self.words(ids).mean(1), "length": ids.sum(1)}


def script(folder: Path, model: nn.Module) -> Path:
    """Write a scripted model as ``net.pt``."""
    path = build.write_model(folder, model, '[[inputs]]\nname = "x"\nshape = []\n') / "model.pt"
    return path.rename(folder / "net.pt")


def written(path: Path, ask: Ask | None = None, **wanted: Any) -> Manifest:
    """Describe a file, write its manifest, and read that."""
    text = manifest_text(path, describe(path, wanted.get("class_name")), Wanted(**wanted), ask)
    return Manifest.model_validate(tomllib.loads(text))


def test_torchscript_is_read_from_its_first_layer(tmp_path: Path) -> None:
    """A linear layer's width, a picture's channels and free sides, ids of any length; outputs by a try."""
    dense = written(script(tmp_path / "a", nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))))
    assert (dense.name, dense.inputs[0].shape, dense.outputs[0].shape) == ("net", (64,), (10,))
    picture = written(script(tmp_path / "b", _Picture()), name="cats")
    assert (picture.name, picture.inputs[0].name) == ("cats", "image")
    assert (picture.inputs[0].shape, picture.outputs[0].shape) == ((3, -1, -1), (5,))
    text = written(script(tmp_path / "c", _Text()))
    assert (text.inputs[0].dtype, text.inputs[0].shape) == ("int64", (-1,))
    assert [(one.name, one.dtype) for one in text.outputs] == [("mean", "float32"), ("length", "int64")]


def test_what_a_file_does_not_tell_is_asked(tmp_path: Path) -> None:
    """The error names the option; a terminal is asked for dtype and shape; a plain number needs neither."""
    path = build.unbatched(tmp_path / "free") / "model.pt"
    with pytest.raises(
        UsageError, match=r"cannot be read from the file; give --input NAME:DTYPE:SHAPE"
    ) as caught:
        written(path)
    assert caught.value.field == "--input"
    asked = []

    def ask(question: str, default: str) -> str:
        asked.append(question)
        return "[2, -1]" if "Shape" in question else default

    for manifest in (written(path, ask), written(path, inputs=("x:float32:2,-1",))):
        assert not manifest.batchable
        assert [(one.name, one.shape) for one in manifest.inputs] == [("x", (2, -1)), ("k", ())]
        assert len(manifest.outputs) == 2
    assert [question.split(" (")[0].split(",")[0] for question in asked] == [
        "dtype of input x",
        "Shape of input x",
    ]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"inputs": ("y:float32:2",)}, "no input 'y'; the inputs are x, k"),
        ({"inputs": ("x:float:2",)}, "'float' is not a dtype"),
        ({"inputs": ("x:float32:a",)}, "'a' is not a shape"),
        ({"inputs": ("x",)}, "must be --input NAME:DTYPE:SHAPE"),
        ({"inputs": ("x:float32:2",), "outputs": ("a",)}, "2 outputs, but 1 names were given"),
        ({"inputs": ("x:float32:2",), "name": "A b"}, "cannot be called 'A b'"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, wanted: dict[str, Any], said: str) -> None:
    """Each with what would be right."""
    path = build.unbatched(tmp_path / "free") / "model.pt"
    with pytest.raises(UsageError, match=said):
        written(path, **wanted)


def test_a_graph_tells_all(tmp_path: Path) -> None:
    """torch.export knows the shapes, what is free, and the largest batch; a fixed batch is a whole shape."""
    open_ = torch.export.Dim("batch", min=1, max=16)
    example = (torch.zeros(2, 3, 32, 32),)
    program = torch.export.export(_Picture().eval(), example, dynamic_shapes={"image": {0: open_}})
    torch.export.save(program, tmp_path / "net.pt2")
    manifest = written(tmp_path / "net.pt2")
    assert (manifest.inputs[0].name, manifest.inputs[0].shape) == ("image", (3, 32, 32))
    assert (manifest.max_batch_size, manifest.outputs[0].shape) == (16, (5,))
    torch.export.save(torch.export.export(_Picture().eval(), example), tmp_path / "one.pt2")
    fixed = written(tmp_path / "one.pt2")
    assert (fixed.batchable, fixed.inputs[0].shape) == (False, (2, 3, 32, 32))


def test_python_is_read_from_its_annotations(tmp_path: Path) -> None:
    """No inputs are written: the annotations stay the source; of several classes one is chosen."""
    path = tmp_path / "model.py"
    path.write_text(
        "class Upper:\n    example = 'a'\n    def predict(self, batch: list[str]) -> list[str]: ...\n"
    )
    manifest = written(path, name="upper")
    assert (manifest.format, manifest.inputs, manifest.class_name) == ("python", (), None)
    assert describe(path)["example_value"] == "a"
    path.write_text(path.read_text() + "class Lower:\n    def predict(self, batch): ...\n")
    with pytest.raises(UsageError, match="Upper, Lower: choose one with --class"):
        written(path)
    assert written(path, class_name="Lower").class_name == "Lower"
    assert written(path, lambda question, default: default).class_name == "Upper"


def test_names_and_files_are_found(tmp_path: Path) -> None:
    """A model is called by its file, or by its folder where the file is just model.pt."""
    assert name_of(tmp_path / "My Model.pt") == "my-model"
    assert name_of(tmp_path / "Ocr" / "model.pt") == "ocr"
    with pytest.raises(UsageError, match="contains no model"):
        artefact_in(tmp_path)
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.py").touch()
    with pytest.raises(UsageError, match=r"a.pt, b.py"):
        artefact_in(tmp_path)
    (tmp_path / "model.py").touch()
    assert artefact_in(tmp_path).name == "model.py"


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    """It may be removed between the question and the look, as an editor does that saves."""
    with pytest.raises(ModelLoadError, match=r"model.py: no such file"):
        describe(tmp_path / "model.py")


def test_a_file_without_a_program_says_what_it_is(tmp_path: Path) -> None:
    """A bare file is the likeliest to be a state dict: the cause is told before it has a manifest."""
    weights = tmp_path / "net.pt"
    torch.save(nn.Linear(2, 2).state_dict(), weights)
    with pytest.raises(ModelLoadError, match=r"it is a state dict.*torch.jit.script"):
        describe(weights)
    shutil.copy(weights, tmp_path / "net.pt2")
    with pytest.raises(ModelLoadError, match="it is a state dict"):
        describe(tmp_path / "net.pt2")
