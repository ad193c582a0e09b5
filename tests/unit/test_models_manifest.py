# SPDX-License-Identifier: Apache-2.0
"""The manifest says what is wrong, where, and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer.errors import ManifestError
from gpuinfer.models.manifest import Manifest, load_manifest, shape_fits

pytestmark = pytest.mark.unit

GOOD = f"""
name = "m"
artefact = "model.pt"
sha256 = "{"0" * 64}"
[[inputs]]
name = "x"
shape = [64]
[[outputs]]
name = "y"
"""


def _load(folder: Path, text: str) -> Manifest:
    (folder / "model.toml").write_text(text, encoding="utf-8")
    return load_manifest(folder)


def test_defaults(tmp_path: Path) -> None:
    """What is left out has the documented default, and the longest limit follows the hard one."""
    manifest = _load(tmp_path, GOOD.replace("[[inputs]]", "hard_time_limit_s = 90\n[[inputs]]", 1))
    assert manifest.batchable
    assert manifest.max_batch_size == 32
    assert manifest.variable == "group"
    assert (manifest.soft_time_limit_s, manifest.hard_time_limit_s, manifest.max_time_limit_s) == (30, 90, 90)
    assert manifest.inputs[0].dtype == "float32"
    assert manifest.outputs[0].kind == "raw"
    assert manifest.format == "torchscript"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "m"', 'name = "../m"', ["name = '../m'", "a-z"]),
        ('name = "m"\n', "", ["name is missing"]),
        ("model.pt", "../model.pt", ["artefact = '../model.pt'", "plain name"]),
        ("model.pt", "/etc/model.pt", ["artefact", "plain name"]),
        ("model.pt", "model.onnx", ["artefact = 'model.onnx'", ".pt2"]),
        ("0" * 64, "0" * 63, ["sha256"]),
        ("[[inputs]]", "max_batch = 3\n[[inputs]]", ["max_batch = 3", "did you mean 'max_batch_size'"]),
        (
            "[[inputs]]",
            "max_batch_size = 0\n[[inputs]]",
            ["max_batch_size = 0", "greater than or equal to 1"],
        ),
        (
            "[[inputs]]",
            "soft_time_limit_s = 60\n[[inputs]]",
            ["soft_time_limit_s < hard_time_limit_s", "60, 60"],
        ),
        ("[[inputs]]", 'hard_time_limit_s = "x"\n[[inputs]]', ["hard_time_limit_s = 'x'", "number"]),
        ("shape = [64]", "shape = [0]", ["inputs.0.shape", "at least 1"]),
        ("shape = [64]", "shape = [-2]", ["inputs.0.shape.0 = -2"]),
        ("shape = [64]", "shape = [1.5]", ["inputs.0.shape.0 = 1.5"]),
        ("shape = [64]", 'shape = [64]\ndtype = "float"', ["inputs.0.dtype = 'float'", "bfloat16"]),
        ('name = "x"', 'name = "b64"', ["inputs.0.name", "b64"]),
        ("[[outputs]]", '[[inputs]]\nname = "x"\nshape = []\n[[outputs]]', ["names must differ"]),
        ('name = "y"', 'name = "y"\nlabels = ["a"]', ["outputs.0", "classification"]),
        (
            "shape = [64]",
            "shape = [64]\nimage = { size = [8, 8] }",
            ["image makes shape [1, 8, 8], not [64]"],
        ),
        ("[[outputs]]", "[[outputs", ["is not valid TOML"]),
    ],
)
def test_errors_name_file_key_value_and_what_is_right(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    """Every fault names the file, the key, its value and what would be right."""
    with pytest.raises(ManifestError) as caught:
        _load(tmp_path, GOOD.replace(old, new, 1))
    assert caught.value.field == str(tmp_path / "model.toml")
    for words in said:
        assert words in caught.value.message


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Two faults are told in one go, not one after another."""
    with pytest.raises(ManifestError) as caught:
        _load(tmp_path, GOOD.replace('"m"', '"M"').replace("[64]", "[0]"))
    assert "name = 'M'" in caught.value.message
    assert "shape" in caught.value.message


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable(tmp_path: Path, content: bytes | None) -> None:
    """A manifest that is missing, or no text, is a ManifestError too."""
    if content is not None:
        (tmp_path / "model.toml").write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path)


def test_shape_fits() -> None:
    """-1 takes any length but none at all; ranks must agree."""
    assert shape_fits((3, 5), (3, -1))
    assert shape_fits((), ())
    assert not shape_fits((3, 0), (3, -1))
    assert not shape_fits((3,), (3, -1))
    assert not shape_fits((4,), (3,))
