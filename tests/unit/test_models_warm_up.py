# SPDX-License-Identifier: Apache-2.0
"""A model loads without data that it refuses: by its example, by what is tried, or without a warm-up."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gpuinfer.errors import ManifestError, ModelLoadError
from gpuinfer.models import examples
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder
from tests import models_for_tests as build

pytestmark = pytest.mark.unit


def _folder(path: Path) -> ModelFolder:
    return ModelFolder(path=path, manifest=load_manifest(path))


def _load(path: Path) -> LoadedModel:
    return load(_folder(path), "cpu")


def _tables(shape: str, more: str = "", top: str = "", dtype: str = "float32") -> str:
    return f"""{top}
[[inputs]]
name = "x"
dtype = "{dtype}"
shape = {shape}
{more}
[[outputs]]
name = "y"
"""


class _OnesAlone(nn.Module):
    """A ``lengths`` input: 0 is none."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 0).any()):
            raise ValueError("lengths must be positive")
        return x


class _Long(nn.Module):
    """wav2vec's first layers: nothing below 400 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 400, stride=320)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.unsqueeze(1))
        return out


class _Choosy(nn.Module):
    """Takes 7 and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x != 7).any()):
            raise ValueError("sevens alone")
        return x


@pytest.mark.parametrize(
    ("model", "shape", "dtype"), [(_OnesAlone(), "[2]", "int64"), (_Long(), "[-1]", "float32")]
)
def test_ones_and_longer_inputs_are_tried(tmp_path: Path, model: nn.Module, shape: str, dtype: str) -> None:
    """A model that refuses zeros, or eight samples, is warmed up with what it takes, and says nothing."""
    loaded = _load(build.write_model(tmp_path / "m", model, _tables(shape, dtype=dtype)))
    assert loaded.warm_up() == 32
    assert (loaded.refused, loaded.warnings) == ("", [])


def test_a_warm_up_length(tmp_path: Path) -> None:
    """A free dimension has the manifest's length in warm-up, and no other is tried."""
    path = build.write_model(tmp_path / "m", _Long(), _tables("[-1]", "warm_up_length = 320"))
    lengths = [candidate.value.shape for candidate in examples.candidates(_folder(path))]
    assert lengths == [(320,), (320,)]
    assert "Kernel size" in _warmed(path).refused
    path = build.write_model(tmp_path / "n", _Long(), _tables("[-1]", "warm_up_length = 720"))
    assert _warmed(path).refused == ""


def test_large_inputs_are_not_made_larger(tmp_path: Path) -> None:
    """What is large at the shortest length is tried with that alone."""
    path = build.write_model(tmp_path / "m", _Choosy(), _tables("[-1, 1024, 1024]"))
    lengths = [candidate.value.shape[0] for candidate in examples.candidates(_folder(path))]
    assert lengths == [8, 8]


def _warmed(path: Path) -> LoadedModel:
    model = _load(path)
    model.warm_up()
    return model


def test_a_model_that_refuses_all_is_loaded(tmp_path: Path) -> None:
    """Its batches start at 1, one warning names the key to set and what it said, and it answers."""
    model = _load(build.write_model(tmp_path / "m", _Choosy(), _tables("[-1]")))
    assert model.warm_up() == 1
    (told,) = model.warnings
    assert "zeros of length 8: RuntimeError" not in told
    assert "builtins.ValueError: sevens alone" in told
    assert "set inputs.x.example in model.toml" in told
    (item,) = model.prepare([[7.0, 7.0]])
    assert model.finish(model.forward([item, item])) == [{"outputs": {"y": [7.0, 7.0]}}] * 2


def test_an_example(tmp_path: Path) -> None:
    """It is the whole warm-up, and nothing is invented; one that fails is the manifest's fault."""
    path = build.write_model(tmp_path / "m", _Choosy(), _tables("[-1]", "example = [7, 7, 7]"))
    model = _load(path)
    assert model.warm_up() == 32
    assert model.warnings == []
    assert model.example() == model.signature.example == [7, 7, 7]
    path = build.write_model(tmp_path / "n", _Choosy(), _tables("[-1]", "example = [7, 8]"))
    with pytest.raises(ModelLoadError, match=r"its example fails: .*sevens alone"):
        _load(path).warm_up()
    path = build.write_model(tmp_path / "o", _Choosy(), _tables("[2]", "example = [7, 7, 7]"))
    with pytest.raises(ModelLoadError, match=r"its example fails: inputs: has shape \[3\]"):
        _load(path).warm_up()


def _write_json(folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps([[7.0, 7.0]] * 2))


def _write_npy(folder: Path) -> None:
    np.save(folder / "x.npy", np.full((2, 2), 7, np.float32))


def _write_png(folder: Path) -> None:
    Image.fromarray(np.full((2, 2), 7, np.uint8)).save(folder / "x.png")


@pytest.mark.parametrize(
    ("name", "write"), [("x.json", _write_json), ("x.npy", _write_npy), ("x.png", _write_png)]
)
def test_an_example_in_a_file(tmp_path: Path, name: str, write: object) -> None:
    """JSON, numpy's file, or an image where the input is made from one; a file that is not there is told."""
    assert callable(write)
    more = f'example_file = "{name}"\nimage = {{ size = [2, 2], layout = "HW" }}'
    path = build.write_model(tmp_path / "m", _Choosy(), _tables("[2, 2]", more))
    with pytest.raises(ManifestError, match=rf"inputs.x.example_file = '{name}': .*No such file"):
        _load(path).warm_up()
    write(path)
    model = _load(path)
    assert model.warm_up() == 32
    assert np.asarray(model.example()).tolist() == [[7, 7], [7, 7]]


class _Two(nn.Module):
    def forward(self, x: Tensor, rate: int) -> Tensor:
        if rate != 16000:
            raise ValueError("16 kHz alone")
        return x.sum(1) / rate


TWO = """
[[inputs]]
name = "x"
shape = [512]
[[inputs]]
name = "rate"
dtype = "int64"
shape = []
%s
[[outputs]]
name = "y"
shape = []
"""


def test_an_example_for_one_of_two_inputs(tmp_path: Path) -> None:
    """The other is invented; the warning names the one that has none."""
    model = _load(build.write_model(tmp_path / "m", _Two(), TWO % "example = 16000"))
    assert model.warm_up() == 32
    assert model.example() is None
    model = _warmed(build.write_model(tmp_path / "n", _Two(), TWO % ""))
    assert "set inputs.x.example, inputs.rate.example in model.toml" in model.warnings[0]


def test_items_whose_numbers_differ_run_apart(tmp_path: Path) -> None:
    """A plain number of forward's is one for the whole batch: items are grouped by it."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor, k: int) -> Tensor:
            return x * k

    model = _load(build.write_model(tmp_path / "m", Scaled(), TWO.replace("[512]", "[1]") % ""))
    with pytest.raises(ModelLoadError, match=r"y has shape \[1\], but its manifest says \[\]"):
        model.warm_up()
    path = build.write_model(tmp_path / "n", Scaled(), TWO.replace("[512]", "[]") % "")
    model = _warmed(path)
    values = [{"x": x, "rate": k} for x, k in ((1.0, 2), (2.0, 3), (3.0, 2))]
    assert [float(y) for (y,) in model.forward(model.prepare(values))] == [2, 6, 6]


class _Counter(nn.Module):
    """Has state, which every pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @torch.jit.export
    def reset_states(self) -> None:
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


def test_before_each_pass(tmp_path: Path) -> None:
    """A method that resets the state is called before each pass; one that is not there is told."""
    tables = _tables("[1]", top='before_each = "reset_states"')
    model = _warmed(build.write_model(tmp_path / "m", _Counter(), tables))
    items = model.prepare([[0.0], [0.0]])
    assert [y.item() for (y,) in model.forward(items) + model.forward(items)] == [1.0] * 4
    with pytest.raises(ModelLoadError, match="before_each = 'reset': the module has no such method"):
        _load(build.write_model(tmp_path / "n", _Counter(), tables.replace("_states", "")))


class _FixedBatch(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.view(self.size, 2)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1, "it accepts one item, but fails with a batch of 32"),
        (4, "accepts a batch of 4, but fails with one item .zeros: "),
    ],
)
def test_a_batch_dimension_that_a_trace_fixed(tmp_path: Path, size: int, said: str) -> None:
    """A trace that turned the batch into a number is told from a model that dislikes zeros."""
    model = _load(build.write_model(tmp_path / "m", _FixedBatch(size), _tables("[2]")))
    with pytest.raises(ModelLoadError, match=said) as caught:
        model.warm_up()
    assert "its batch dimension seems to be fixed" in caught.value.message
    assert "batchable = false" in caught.value.message


class _Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.fft.fft(x)
        return out


def test_a_complex_output(tmp_path: Path) -> None:
    """It is told before a request fails, with what to return instead."""
    with pytest.raises(ModelLoadError, match=r"output y is complex64.*torch.view_as_real"):
        _load(build.write_model(tmp_path / "m", _Complex(), _tables("[4]"))).warm_up()


class _Modes(nn.Module):
    def forward(self, x: Tensor, mode: str, k: int) -> Tensor:
        return x * k if mode == "a" else x


@pytest.mark.parametrize(
    ("module", "tables", "said"),
    [
        (
            _Two(),
            _tables("[512]"),
            "forward takes (x: Tensor, rate: int), but the manifest names 1 inputs: x",
        ),
        (_Two(), (TWO % "").replace("shape = []\n\n", "shape = [1]\n"), "inputs.rate must have shape = []"),
        (_Two(), (TWO % "").replace("int64", "float32"), 'an integer dtype, such as "int64"'),
        (_Modes(), _tables("[1]") + _tables("[]")[: -len('[[outputs]]\nname = "y"\n')], ""),
    ],
)
def test_forward_and_the_manifest(tmp_path: Path, module: nn.Module, tables: str, said: str) -> None:
    """What forward takes is held against the inputs when it is loaded."""
    if isinstance(module, _Modes):
        names = iter(("mode", "k"))
        more = "".join(f'[[inputs]]\nname = "{name}"\nshape = []\n' for name in names)
        tables = _tables("[1]").replace("[[outputs]]", more + "[[outputs]]")
        said = "forward's argument mode is a str, but inputs can only be tensors and numbers"
    with pytest.raises(ModelLoadError) as caught:
        _load(build.write_model(tmp_path / "m", module, tables))
    assert said in caught.value.message


# -- files that are not what they are taken for ------------------------------------------------


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def _put(folder: Path, artefact: str, value: object, **options: bool) -> Path:
    folder.mkdir()
    torch.save(value, folder / artefact, **options)
    build.write_manifest(folder, artefact, _tables("[2]"))
    return folder


def _refused(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        _load(path)
    assert caught.value.field == path.name
    return caught.value.message


def test_a_state_dict(tmp_path: Path) -> None:
    """The commonest mistake: it is told from a pickled module, and how to export the program stands there."""
    weights = _Linear().state_dict()
    for number, (artefact, options) in enumerate(
        [("m.pt", {}), ("m.pth", {}), ("m.pt2", {}), ("m.pt", {"_use_new_zipfile_serialization": False})]
    ):
        told = _refused(_put(tmp_path / f"m{number}", artefact, weights, **options))
        assert "is a state dict: weights without a program" in told
        assert "torch.jit.script(model.eval())" in told
        assert "model.py" in told
    told = _refused(_put(tmp_path / "whole", "m.pt", _Linear()))
    assert f"a pickled object of {__name__}._Linear" in told


def test_a_file_of_the_other_format(tmp_path: Path) -> None:
    """TorchScript under torch.export's suffix, and the other way round; and what is neither."""
    path = tmp_path / "a"
    build.write_model(path, _Linear(), _tables("[2]"))
    (path / "model.pt").rename(path / "model.pt2")
    build.write_manifest(path, "model.pt2", _tables("[2]"))
    assert "it is TorchScript, but .pt2 means torch.export: rename model.pt2 to model.pt" in _refused(path)
    _export(tmp_path / "b", _Linear(), (torch.zeros(2, 2),), _tables("[2]"))
    (tmp_path / "b" / "model.pt2").rename(tmp_path / "b" / "model.pt")
    build.write_manifest(tmp_path / "b", "model.pt", _tables("[2]"))
    assert "is a torch.export file, but its suffix means TorchScript" in _refused(tmp_path / "b")
    for name in ("c.pt", "c.pt2"):
        path = tmp_path / name.replace(".", "")
        path.mkdir()
        (path / name).write_text("<html>404 Not Found</html>")
        build.write_manifest(path, name, _tables("[2]"))
        assert "neither TorchScript nor a torch.export file" in _refused(path)


def _export(
    folder: Path, module: nn.Module, inputs: tuple[object, ...], tables: str, **options: object
) -> Path:
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), inputs, **options)  # type: ignore[arg-type]
        torch.export.save(program, folder / "model.pt2")
    build.write_manifest(folder, "model.pt2", tables)
    return folder


class _Times(nn.Module):
    def forward(self, x: Tensor, k: int = 3, *, bias: Tensor | None = None) -> Tensor:
        return x * k if bias is None else x * k + bias


def test_what_an_export_has_fixed(tmp_path: Path) -> None:
    """A batch dimension, a number, a dtype, a rank: each is told with the key and what would be right."""
    x = torch.zeros(4, 2)
    told = _refused(_export(tmp_path / "a", _Linear(), (x,), _tables("[2]")))
    assert "its batch dimension was fixed at 4 when it was exported" in told
    assert "{'x': {0: torch.export.Dim('batch')}}" in told
    assert "batchable = false and shape = [4, 2]" in told
    dynamic = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}}
    assert _warmed(_export(tmp_path / "b", _Linear(), (x,), _tables("[2]"), **dynamic)).refused == ""
    few = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch", max=16)}}}
    told = _refused(_export(tmp_path / "f", _Linear(), (x,), _tables("[2]"), **few))
    assert "max_batch_size = 32: the program was exported for batches of at most 16" in told
    told = _refused(_export(tmp_path / "c", _Linear(), (x,), _tables("[2]", dtype="int64"), **dynamic))
    assert "inputs.x.dtype = 'int64': the program was exported for float32" in told
    told = _refused(_export(tmp_path / "d", _Linear(), (x,), _tables("[4, 2]"), **dynamic))
    assert "the program takes 2 dimensions, of which the first is the batch" in told
    fixed = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}, "k": None}}
    number = '[[inputs]]\nname = "k"\ndtype = "int64"\nshape = []\n'
    tables = _tables("[2]").replace("[[outputs]]", number + "[[outputs]]")
    told = _refused(_export(tmp_path / "e", _Times(), (x, 3), tables, **fixed))
    assert "inputs.k: the export has fixed k at 3" in told


def test_arguments_that_an_export_has_fixed_are_filled_in(tmp_path: Path) -> None:
    """Without them in the manifest the model is called as it was exported, keyword arguments too."""
    batch = {0: torch.export.Dim("batch")}
    options = {
        "kwargs": {"bias": torch.zeros(4, 2)},
        "dynamic_shapes": {"x": batch, "k": None, "bias": batch},
    }
    tables = _tables("[2]").replace("[[outputs]]", '[[inputs]]\nname = "bias"\nshape = [2]\n[[outputs]]')
    model = _warmed(_export(tmp_path / "m", _Times(), (torch.zeros(4, 2), 3), tables, **options))
    (item,) = model.prepare([{"x": [1, 2], "bias": [10, 20]}])
    assert model.forward([item])[0][0].tolist() == [13, 26]


def test_a_missing_operator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator, and the key that imports its library; with that it loads."""
    library: Any = torch.library.Library("opslib", "DEF")  # type: ignore[no-untyped-call]
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")

    class Op(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.opslib.twice(x)
            return out + 0

    script = build.write_model(tmp_path / "script", Op(), _tables("[2]"))
    library._destroy()
    told = _refused(script)
    assert "it needs the operator opslib::twice, which no imported library registers" in told
    assert "set imports = ['opslib'] in model.toml" in told
    manifest = script / "model.toml"
    manifest.write_text('imports = ["opslib"]\n' + manifest.read_text())
    assert "imports = [..., 'opslib'] failed: ModuleNotFoundError" in _refused(script)
    assert "install opslib" in _refused(script)
    (tmp_path / "opslib.py").write_text(
        'import torch\nlibrary = torch.library.Library("opslib", "DEF")\n'
        'library.define("twice(Tensor x) -> Tensor")\n'
        'library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = _warmed(script)
    assert model.forward(model.prepare([[1, 2]]))[0][0].tolist() == [2, 4]
