# SPDX-License-Identifier: Apache-2.0
"""Python models: a file with a class, what it is given, and what becomes of what it does."""

from __future__ import annotations

import base64
import io
import logging
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from gpuinfer.errors import GpuinferError, InferenceError, InputError, ModelLoadError
from gpuinfer.models import words
from gpuinfer.models.context import Work, working
from gpuinfer.models.formats.python import PythonModel, read
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder
from tests.models_for_tests import python_model

pytestmark = pytest.mark.unit


def loaded(folder: Path) -> PythonModel:
    found = ModelFolder(path=folder, manifest=load_manifest(folder))
    with found.artefact.open("rb") as file:
        return read(found, file, "cpu")


def model(tmp_path: Path, code: str, tables: str = "") -> PythonModel:
    return loaded(python_model(tmp_path / "mine", code, tables))


def answers(one: PythonModel, values: list[object]) -> list[Any]:
    """Take values all the way; an error in the place of what failed."""
    results: list[Any] = one.prepare(values)
    for step in (one.forward, one.finish):
        good = [i for i, value in enumerate(results) if not isinstance(value, Exception)]
        for i, value in zip(good, step([results[i] for i in good]), strict=True):
            results[i] = value
    return results


def test_a_class_with_two_methods_is_a_model(tmp_path: Path) -> None:
    """No base class, no import of ours; a module beside it, parameters, and JSON in and out."""
    python_model(
        tmp_path / "mine",
        """
        import helper

        class Mine:
            def load(self, ctx):
                self.by = ctx.parameters["by"]
                self.said = (ctx.folder / "said.txt").read_text()
                assert ctx.device == "cpu" and not ctx.cancelled
                ctx.progress(0.5)

            def predict(self, batch):
                return [{"value": helper.times(x, self.by), "said": self.said} for x in batch]
        """,
        "[parameters]\nby = 3\n",
    )
    (tmp_path / "mine" / "helper.py").write_text("def times(x, y):\n    return x * y\n")
    (tmp_path / "mine" / "said.txt").write_text("yes")
    assert answers(loaded(tmp_path / "mine"), [1, 2]) == [
        {"output": {"value": 3, "said": "yes"}},
        {"output": {"value": 6, "said": "yes"}},
    ]
    assert "helper" not in sys.modules  # another model may have one, too
    assert not (tmp_path / "mine" / "__pycache__").exists()


def test_what_an_item_s_code_raises_is_the_item_s(tmp_path: Path) -> None:
    """In prepare, in finish, and as an entry of predict's list: type, message, file and line are told."""
    one = model(
        tmp_path,
        """
        class Mine:
            def prepare(self, item: int):
                if item == 1:
                    raise ValueError("one")
                return item

            def predict(self, batch):
                return [KeyError("two") if x == 2 else x for x in batch]

            def finish(self, out):
                return 1 / (out - 3)
        """,
    )
    results = answers(one, [0, 1, 2, 3, "x", 4])
    assert results[5] == {"output": 1.0}
    assert [type(result) for result in results[1:5]] == [InferenceError] * 3 + [InputError]
    assert str(results[1]) == "mine.prepare: ValueError: one (model.py, line 5)"
    assert str(results[2]) == "mine.predict: KeyError: 'two'"
    assert str(results[3]) == "mine.finish: ZeroDivisionError: division by zero (model.py, line 12)"
    assert isinstance(results[1].__cause__, ValueError)
    assert results[4].field == "inputs"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("batch[1:]", "returned 1 outputs for 2 items"),
        ("batch + batch", "returned 4 outputs for 2 items"),
        ("None", "must return a list"),
        ("{}", "must return a list"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(model.py, line 4\)"),
        ("__import__('sys').exit(3)", "SystemExit: 3"),
    ],
)
def test_a_pass_that_fails_as_a_whole(tmp_path: Path, returned: str, said: str) -> None:
    """A list of another length shifts nothing: it is the model's error, as one that it raises."""
    one = model(tmp_path, f"class Mine:\n    def predict(self, batch):\n\n        return {returned}\n")
    with pytest.raises(InferenceError, match=said):
        one.forward([1, 2])


def test_arrays_by_the_manifest(tmp_path: Path) -> None:
    """With [[inputs]] and [[outputs]] a Python model is asked and answers as any other."""
    one = model(
        tmp_path,
        """
        import torch

        class Mine:
            def predict(self, batch):
                return torch.stack([torch.from_numpy(x) for x in batch]).softmax(dim=1)
        """,
        """
        [[inputs]]
        name = "x"
        shape = [2]
        [[outputs]]
        name = "class"
        kind = "classification"
        labels = ["a", "b"]
        """,
    )
    results = answers(one, [[0.0, 9.0], [9.0, 0.0], [1.0]])
    assert [result["label"] for result in results[:2]] == ["b", "a"]
    assert results[2].code == "shape_mismatch"


def test_without_a_batch_it_is_called_with_one(tmp_path: Path) -> None:
    """batchable = false: predict takes one item; nothing else makes it so."""
    code = "class Mine:\n    def predict(self, item: str):\n        return item.upper()\n"
    assert answers(model(tmp_path, code, "batchable = false"), ["a", "b"]) == [
        {"output": "A"},
        {"output": "B"},
    ]
    with pytest.raises(ModelLoadError, match="batchable = false"):
        model(tmp_path, code)


def test_files_are_what_the_annotation_says(tmp_path: Path) -> None:
    """An image is decoded; a path is that of a file that is there until the answer is."""
    picture = io.BytesIO()
    PIL.Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(picture, "PNG")
    code = """
        from pathlib import Path
        from typing import TypedDict
        from PIL.Image import Image

        class Item(TypedDict):
            scan: Image
            raw: Path

        class Mine:
            def prepare(self, item: Item):
                return item["scan"].size, item["raw"]

            def predict(self, batch):
                return batch

            def finish(self, out):
                size, path = out
                return [*size, path.read_bytes().decode(), str(path)]
        """
    one = model(tmp_path, code)
    good = {"scan": picture.getvalue(), "raw": {"b64": "aGk=", "name": "../a.txt"}}
    bad = {"scan": b"nothing", "raw": b""}
    results = answers(one, [good, bad, {"scan": b""}])
    *told, path = results[0]["output"]
    assert told == [3, 2, "hi"]
    assert path.endswith(".txt")
    assert "cannot be read as an image" in str(results[1])
    assert results[1].field == "inputs.scan"
    assert results[2].code == "missing_input"
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1", "must have one class with a method predict; there is none"),
        ("class A:\n    def predict(self, b): ...\nclass B(A): ...", "A, B: name one of them as class"),
        ("class A:\n    async def predict(self, b): ...", "A.predict is async"),
        ("import torch_that_is_not_there", "model.py cannot be imported: ModuleNotFoundError: .*line 1"),
        ("class A:\n    def predict(self, b) ...", r"SyntaxError: [^(]*\(model.py, line 2\)$"),
        (
            "class A:\n    def load(self, c): c.nothing\n    def predict(self, b): ...",
            "A.load failed: Attr.*line 2",
        ),
        ("class A:\n    def predict(self, b: list[object()]): ...", "A.predict: its annotation"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        model(tmp_path, code)


def test_the_example_warms_up(tmp_path: Path) -> None:
    """Alone and in the largest batch; a model that fails on its own example is not served."""
    code = (
        "class A:\n    example = {0}\n    def predict(self, batch):\n        return [1 / x for x in batch]\n"
    )
    assert model(tmp_path, code.format(2), "max_batch_size = 8").warm_up() == 8
    assert model(tmp_path, code.format(None)).warm_up() == 1
    with pytest.raises(ModelLoadError, match=r"its example fails: .*ZeroDivisionError"):
        model(tmp_path, code.format(0)).warm_up()


def test_a_model_s_words_are_logged_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """print, sys.stderr and logging, line by line; what we print ourselves stays where it was."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", words.Words(out))
    one = model(
        tmp_path,
        """
        class Mine:
            def load(self, ctx):
                self.ctx = ctx

            def predict(self, batch):
                print("first\\nsecond", len(batch), end="")
                self.ctx.log.warning("third")
                return batch
        """,
    )
    with caplog.at_level(logging.INFO), working(Work(model="mine", task_ids=["t1"])):
        one.forward([1])
    print("ours")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("model.mine", "first"),
        ("model.mine", "third"),
        ("model.mine", "second 1"),
    ]
    assert out.getvalue() == "ours\n"


def test_its_errors_are_ours(tmp_path: Path) -> None:
    """Memory that runs out is told apart from what else goes wrong."""
    code = "class A:\n    def predict(self, batch):\n        raise {0}\n"
    for raised, wanted in (
        ("MemoryError()", "device_out_of_memory"),
        ("RuntimeError('CUDA error: an illegal memory access was encountered')", "device_unusable"),
        ("RuntimeError('CUDA out of memory')", "device_out_of_memory"),
        ("RuntimeError('no')", "inference_failed"),
    ):
        with pytest.raises(GpuinferError) as caught:
            model(tmp_path, code.format(raised)).forward([1])
        assert caught.value.code == wanted


def test_the_manifest_s_kinds(tmp_path: Path) -> None:
    """An image and a sound as files or arrays in base64, JSON by its schema: each error names its input."""
    tables = """
        [[inputs]]
        name = "scan"
        kind = "image"
        [[inputs]]
        name = "voice"
        kind = "audio"
        audio = { rate = 8000, channels = 2 }
        [[inputs]]
        name = "options"
        kind = "json"
        schema = { type = "object", properties = { n = { type = "integer", minimum = 1 } } }
        """
    code = """
        class Mine:
            def predict(self, batch):
                return [[*i["scan"].size, *i["voice"].shape, i["options"]["n"]] for i in batch]
        """
    one = model(tmp_path, code, tables)
    picture = io.BytesIO()
    PIL.Image.fromarray(np.zeros((2, 3), np.uint8)).save(picture, "PNG")
    pixels = {"b64": base64.b64encode(bytes(6)).decode(), "dtype": "uint8", "shape": [2, 3]}
    samples = {"b64": base64.b64encode(bytes(32)).decode(), "dtype": "float32", "shape": [2, 4]}
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(4000)
        file.writeframes(bytes(40))
    good = {"scan": picture.getvalue(), "voice": sound.getvalue(), "options": {"n": 3}}
    results = answers(
        one,
        [
            good,
            {**good, "scan": pixels, "voice": samples},
            {**good, "options": {"n": 0}},
            {**good, "voice": sound.getvalue()[:-4]},
            {**good, "scan": b"GIF89a"},
        ],
    )
    assert results[:2] == [{"output": [3, 2, 2, 40, 3]}, {"output": [3, 2, 2, 4, 3]}]
    assert [error.field for error in results[2:]] == ["inputs.options.n", "inputs.voice", "inputs.scan"]


def test_a_schema_that_cannot_be_used_is_told_at_once(tmp_path: Path) -> None:
    """When the model is loaded, with the key's name."""
    tables = '[[inputs]]\nname = "x"\nkind = "json"\nschema = { type = "strange" }\n'
    with pytest.raises(GpuinferError, match=r"inputs\.x\.schema: is not a usable JSON schema"):
        model(tmp_path, "class Mine:\n    def predict(self, batch):\n        return batch\n", tables)


def test_a_batch_of_another_length_is_told_in_python_s_words(tmp_path: Path) -> None:
    """Nothing of it was exported: what predict returns is what is wrong."""
    one = model(
        tmp_path,
        """
        class A:
            example = 1
            def predict(self, batch):
                return batch[:1]
        """,
    )
    with pytest.raises(
        ModelLoadError, match=r"returned 1 outputs for 32 items.*one of the same length"
    ) as caught:
        one.warm_up()
    assert "export" not in caught.value.message
