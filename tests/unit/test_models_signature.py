# SPDX-License-Identifier: Apache-2.0
"""What a model takes, read from its manifest or its annotations, and written as plain JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import PIL.Image
import pydantic
import pytest
import torch
from annotated_types import Ge

from gpuinfer.errors import ManifestError, ModelLoadError
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.signature import Signature, from_class, from_manifest

pytestmark = pytest.mark.unit


class Order(pydantic.BaseModel):
    text: str
    count: Annotated[int, Ge(1)] = 1


class Page(TypedDict):
    scan: PIL.Image.Image
    language: str


def signature_of(item: Any) -> Signature:
    class Model:
        def prepare(self, item: Any) -> Any: ...

        def predict(self, batch: list[Any]) -> Any: ...

    Model.prepare.__annotations__["item"] = item
    signature, typed = from_class(Model)
    assert [one.input for one in typed] == list(signature.inputs)
    return signature


@pytest.mark.parametrize(
    ("item", "kind", "known"),
    [
        (str, "text", {"schema": {"type": "string"}}),
        (int, "json", {"schema": {"type": "integer"}}),
        (float, "json", {"schema": {"type": "number"}}),
        (bool, "json", {"schema": {"type": "boolean"}}),
        (dict[str, int], "json", {"schema": {"additionalProperties": {"type": "integer"}, "type": "object"}}),
        (list[str], "json", {"schema": {"items": {"type": "string"}, "type": "array"}}),
        (Annotated[int, Ge(1)], "json", {"schema": {"minimum": 1, "type": "integer"}}),
        (bytes, "bytes", {}),
        (Path, "file", {}),
        (PIL.Image.Image, "image", {}),
        (np.ndarray, "tensor", {}),
        (npt.NDArray[np.float32], "tensor", {"dtype": "float32"}),
        (torch.Tensor, "tensor", {}),
    ],
)
def test_an_annotation_is_the_signature(item: Any, kind: str, known: dict[str, Any]) -> None:
    """Each of the types that a model may name has its kind, and what is known of it."""
    signature = signature_of(item)
    assert [one.to_json() for one in signature.inputs] == [{"name": "input", "kind": kind, **known}]
    assert signature.source == "annotations"
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


def test_a_pydantic_model_is_one_value() -> None:
    """Its fields are the value's; they are no inputs of their own."""
    only = signature_of(Order).only
    assert only is not None
    assert only.schema is not None
    assert only.schema["properties"]["count"] == {
        "default": 1,
        "minimum": 1,
        "title": "Count",
        "type": "integer",
    }


def test_a_typed_dictionary_names_the_inputs() -> None:
    """Each key is one, of its own kind."""
    signature = signature_of(Page)
    assert signature.named
    assert [(one.name, one.kind) for one in signature.inputs] == [("scan", "image"), ("language", "text")]


def test_the_elements_of_the_batch_tell_too() -> None:
    """Annotations never decide whether a model is batched: a batch that is no list is an error."""

    class Batched:
        def predict(self, batch: list[str]) -> Any: ...

    class Single:
        def predict(self, text: str) -> Any: ...

    class Silent:
        def predict(self, batch): ...  # type: ignore[no-untyped-def]

    assert from_class(Batched)[0].inputs[0].kind == "text"
    assert from_class(Single, batchable=False)[0].inputs[0].kind == "text"
    silent = from_class(Silent)[0]
    assert (silent.source, silent.inputs[0].kind, silent.inputs[0].schema) == ("none", "json", None)
    with pytest.raises(ModelLoadError, match=r"Single.predict: .*list\[str\].*batchable = false"):
        from_class(Single)


def test_a_manifest_s_inputs_are_the_signature() -> None:
    """Names, dtypes and shapes as they stand there."""
    body = {
        "name": "m",
        "artefact": "model.pt",
        "inputs": [{"name": "x", "shape": [3, -1]}, {"name": "k", "dtype": "int64", "shape": []}],
        "outputs": [{"name": "y"}],
    }
    signature = from_manifest(Manifest.model_validate(body))
    assert signature is not None
    assert signature.named
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
    assert [one.to_json() for one in signature.inputs] == [
        {"name": "x", "kind": "tensor", "dtype": "float32", "shape": [3, -1]},
        {"name": "k", "kind": "tensor", "dtype": "int64", "shape": []},
    ]


@pytest.mark.parametrize("body", [{}, {"inputs": [{"name": "x", "kind": "smell"}], "batchable": True}, []])
def test_what_is_no_signature_is_refused(body: Any) -> None:
    with pytest.raises(ManifestError, match="is no signature"):
        Signature.from_json(body)
