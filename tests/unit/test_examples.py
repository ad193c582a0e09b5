# SPDX-License-Identifier: Apache-2.0
"""The examples in packaging/examples: each is made as its README says, loaded, warmed up, and answers."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuinfer.client.inputs import opened
from gpuinfer.client.validation import Validator
from gpuinfer.errors import InputError
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder

pytestmark = pytest.mark.unit

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/model.toml"))


class Examples:
    """Makes each example once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, LoadedModel] = {}

    def __getitem__(self, name: str) -> LoadedModel:
        if name not in self._loaded:
            made = shutil.copytree(EXAMPLES / name, self.folder / name)
            sys.path.insert(0, str(made))
            try:
                runpy.run_path(str(made / "make_weights.py"))
            finally:
                sys.path.remove(str(made))
                sys.modules.pop("model", None)
            self._loaded[name] = load(ModelFolder(path=made, manifest=load_manifest(made)), "cpu", threads=1)
        return self._loaded[name]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examples]:
    yield Examples(tmp_path_factory.mktemp("examples"))


def answers(model: LoadedModel, *values: Any) -> list[Any]:
    """Take requests the way of the front and the worker; an error in the place of what failed."""
    check = Validator(model.signature)
    sent = [opened(value, many=False, kinds=check.kinds) for value in values]
    for value in sent:
        check.check(value)
    results: list[Any] = model.prepare(sent)
    for step in (model.forward, model.finish):
        good = [i for i, value in enumerate(results) if not isinstance(value, Exception)]
        if not good:
            break
        for i, value in zip(good, step([results[i] for i in good]), strict=True):
            results[i] = value
    return results


def test_there_are_four_and_the_readme_names_them() -> None:
    """A folder that is added is told of."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" in text] == NAMES
    assert len(NAMES) == 4
    for name in NAMES:
        assert load_manifest(EXAMPLES / name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_it_warms_up_with_its_example(examples: Examples, name: str) -> None:
    """Alone and in its largest batch."""
    model = examples[name]
    assert model.warm_up() == model.manifest.max_batch_size


def test_the_image_classifier(examples: Examples) -> None:
    """A photo gets a class with a label; one that is cut off fails alone."""
    model, photo = examples["image-classifier"], EXAMPLES / "image-classifier" / "example.jpg"
    good, bad, again = answers(model, photo, photo.read_bytes()[:700], photo.read_bytes())
    assert good["label"] in ("cat", "dog", "bird", "fish")
    assert good["label"] == again["label"]
    assert good["confidence"] == pytest.approx(again["confidence"], abs=1e-5)
    assert isinstance(bad, InputError)


def test_the_text_encoder(examples: Examples) -> None:
    """A text's vector does not depend on its neighbours; an empty text is refused by the schema."""
    model = examples["text-encoder"]
    (alone,) = answers(model, "a cat")
    _, beside = answers(model, "a much longer text than that of the cat, with many words", "a cat")
    vector = alone["output"]["vector"]
    assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-3)
    assert beside["output"]["vector"] == pytest.approx(vector, abs=1e-4)
    assert "holds no word" in str(answers(model, " ")[0])
    with pytest.raises(InputError, match="shorter than 1"):
        answers(model, "")


def test_the_speech_commands(examples: Examples) -> None:
    """A WAV file of another rate gets a command."""
    (found,) = answers(examples["speech-commands"], EXAMPLES / "speech-commands" / "example.wav")
    assert found["label"] in ("yes", "no", "stop", "go")


def test_the_picture_search(examples: Examples) -> None:
    """Two inputs by name: a likeness; one that is missing is named."""
    model = examples["picture-search"]
    photo = EXAMPLES / "image-classifier" / "example.jpg"
    one, other = answers(model, {"picture": photo, "text": "a cat"}, {"picture": photo, "text": "a red ball"})
    assert one["output"] != other["output"]
    assert abs(one["output"]) <= 1
    with pytest.raises(InputError, match=r"inputs\.text"):
        answers(model, {"picture": photo})
