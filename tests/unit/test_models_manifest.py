# SPDX-License-Identifier: Apache-2.0
"""The manifest says what is wrong, where, and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer.errors import ManifestError
from gpuinfer.models.manifest import Manifest, load_manifest
from gpuinfer.models.specs import shape_fits

pytestmark = pytest.mark.unit

GOOD = """
name = "m"
artefact = "model.pt"
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
        ('[[outputs]]\nname = "y"\n', "", ["outputs is missing", "[[outputs]]"]),
        ("shape = [64]", "", ["inputs.0", "shape is missing"]),
        ("shape = [64]", 'kind = "text"', ["inputs.x.kind = 'text'", "model.pt takes only tensors"]),
        ("shape = [64]", "shape = [64]\nwarm_up_length = 8", ["warm_up_length", "the shape has none"]),
        ("shape = [64]", 'shape = [64]\nexample = 1\nexample_file = "x.json"', ["both given"]),
        ("shape = [64]", 'shape = [64]\nexample_file = "../x.json"', ["inputs.0.example_file", ".json"]),
        ("shape = [64]", 'shape = [64]\nexample_file = "x.pdf"', ["inputs.0.example_file", ".json"]),
        ("shape = [64]", "shape = [64]\nschema = {}", ["schema is for kind = 'json', not 'tensor'"]),
        ("shape = [64]", "shape = [2, -1]\naudio = {}", ["audio makes shape [1, samples], not [2, -1]"]),
        ("[[inputs]]", 'class = "Model"\n[[inputs]]', ["class is only for Python models"]),
        ("[[inputs]]", 'imports = ["torch vision"]\n[[inputs]]', ["imports.0 = 'torch vision'"]),
        ("[[inputs]]", "before_eech = 3\n[[inputs]]", ["did you mean 'before_each'"]),
        ('model.pt"', 'model.pt2"\nbefore_each = "reset"', ["before_each = 'reset'", "no methods"]),
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


@pytest.mark.parametrize(
    ("artefact", "format_"),
    [
        ("model.py", "python"),
        ("model.pt2", "export"),
        *((f"model{suffix}", "torchscript") for suffix in (".pt", ".jit", ".ts", ".pth", ".torchscript")),
    ],
)
def test_the_suffix_decides_the_format(tmp_path: Path, artefact: str, format_: str) -> None:
    """People call TorchScript files by many names."""
    assert _load(tmp_path, GOOD.replace("model.pt", artefact)).format == format_


def test_a_python_model_needs_no_more_than_a_name(tmp_path: Path) -> None:
    """Inputs of other kinds than tensors are its own; its signature may come from annotations."""
    bare = _load(tmp_path, 'name = "m"\nartefact = "model.py"\n')
    assert (bare.inputs, bare.outputs, bare.class_name, bare.before_each) == ((), (), None, None)
    tables = """
    class = "Ocr"
    before_each = "reset_states"
    imports = ["torchvision.ops"]
    parameters = { beam = 4 }
    [[inputs]]
    name = "scan"
    kind = "image"
    example_file = "scan.JPG"
    [[inputs]]
    name = "options"
    kind = "json"
    schema = { type = "object" }
    example = { language = "en" }
    [[inputs]]
    name = "speech"
    shape = [1, -1]
    audio = { rate = 8000 }
    warm_up_length = 256
    """
    manifest = _load(tmp_path, 'name = "m"\nartefact = "model.py"\n' + tables)
    assert (manifest.class_name, manifest.parameters) == ("Ocr", {"beam": 4})
    scan, options, speech = manifest.inputs
    assert (scan.kind, options.json_schema, options.example) == (
        "image",
        {"type": "object"},
        {"language": "en"},
    )
    assert speech.audio is not None
    assert (speech.audio.rate, speech.audio.channels, speech.warm_up_length) == (8000, 1, 256)
    assert manifest.model_dump(by_alias=True)["class"] == "Ocr"
