# SPDX-License-Identifier: Apache-2.0
"""Requests are checked by a model's signature before they are queued: what is wrong, and at what cost."""

from __future__ import annotations

import base64
import io
import sys
import timeit
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from gpuinfer.client.signatures import FRESH_S, SURE_S, Signatures
from gpuinfer.client.validation import MAX_VALUES, Validator
from gpuinfer.errors import DtypeMismatch, GpuinferError, InputError, MissingInput, ShapeMismatch
from gpuinfer.models.signature import Input, Signature

pytestmark = pytest.mark.unit

DIGIT = Input(name="image", kind="tensor", dtype="float32", shape=(1, 2, 2), file="image")
IDS = Input(name="ids", kind="tensor", dtype="int64", shape=(-1,))
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 5}, "n": {"$ref": "#/$defs/N"}},
    "required": ["text"],
    "$defs": {"N": {"type": "integer", "minimum": 1}},
}
DOC = Input(name="doc", kind="json", schema=SCHEMA)


def encoded(dtype: str, *shape: int) -> dict[str, Any]:
    return {"b64": "AAAA", "dtype": dtype, "shape": list(shape)}


def validator(*inputs: Input) -> Validator:
    return Validator(Signature(inputs=inputs, named=len(inputs) > 1))


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (DIGIT, [[[0, 1.5], [2, 3]]]),
        (DIGIT, (((0, 1.5), (2, 3)),)),
        (DIGIT, np.zeros((1, 2, 2))),
        (DIGIT, torch.zeros(1, 2, 2, dtype=torch.bfloat16)),
        (DIGIT, np.zeros((1, 2, 2), np.uint8)),
        (DIGIT, [np.zeros((2, 2))]),
        (DIGIT, [[[np.float32(0), 1], [2, 3]]]),
        (DIGIT, encoded("float16", 1, 2, 2)),
        (DIGIT, b"a picture"),
        (DIGIT, {"b64": "AAAA", "name": "cat.jpg"}),
        (IDS, [1, 2, 3]),
        (IDS, np.arange(3, dtype=np.uint16)),
        (Input(name="x", kind="tensor", dtype="float32", shape=()), 1.5),
        (Input(name="x", kind="tensor", dtype="bool", shape=(1,)), [True]),
        (Input(name="x", kind="tensor"), [["whatever"]]),
        (Input(name="x", kind="tensor", dtype="float32", shape=(2,)), [1.5, "the worker sees this"]),
        (DOC, {"text": "hello", "n": 1}),
        (DOC, {"text": "hello", "more": np.zeros(2)}),
        (Input(name="x"), {"any": None}),
        (Input(name="x", kind="text", schema={"type": "string"}), "hello"),
        (Input(name="x", kind="image"), b"a picture"),
        (Input(name="x", kind="image"), np.zeros((2, 2, 3), np.uint8)),
        (Input(name="x", kind="image"), encoded("uint8", 2, 2)),
        (Input(name="x", kind="file"), {"b64": "AAAA"}),
        (Input(name="x", kind="bytes"), memoryview(b"abc")),
    ],
)
def test_what_fits_passes(wanted: Input, value: Any) -> None:
    """In each form that a caller may have it."""
    validator(wanted).check(value)


@pytest.mark.parametrize(
    ("wanted", "value", "error", "words"),
    [
        (DIGIT, [1, 2, 3], ShapeMismatch, "has shape [3], the model wants [1, 2, 2]"),
        (DIGIT, [[[1, 2], [3, 4]], [[5]]], ShapeMismatch, "has shape [2, 2, 2]"),
        (DIGIT, np.zeros((2, 2)), ShapeMismatch, "has shape [2, 2]"),
        (DIGIT, torch.zeros(1, 2), ShapeMismatch, "has shape [1, 2]"),
        (DIGIT, encoded("float32", 4), ShapeMismatch, "has shape [4]"),
        (DIGIT, "a cat", ShapeMismatch, "is a string, the model wants shape [1, 2, 2]"),
        (DIGIT, [[["0", 1], [2, 3]]], DtypeMismatch, "holds a string, the model wants float32"),
        (DIGIT, [[[True, 1], [2, 3]]], DtypeMismatch, "holds true or false"),
        (DIGIT, np.zeros((1, 2, 2), bool), DtypeMismatch, "is bool, the model wants float32"),
        (DIGIT, {"b64": "AAAA", "dtype": "float32"}, InputError, "b64, dtype and shape; got b64, dtype"),
        (DIGIT, {"imgae": [[[1]]]}, InputError, "has the keys b64, dtype and shape; got imgae"),
        (IDS, [1.5], DtypeMismatch, "holds a fractional number, the model wants int64"),
        (IDS, torch.zeros(3), DtypeMismatch, "is float32, the model wants int64"),
        (IDS, [], ShapeMismatch, "has shape [0], the model wants [-1] (-1: any length)"),
        (IDS, b"a picture", InputError, "must be numbers or an array, got a file"),
        (Input(name="x", kind="text"), 7, InputError, "must be a string, got a number"),
        (Input(name="x", kind="text", schema={"maxLength": 2}), "abc", InputError, "longer than 2"),
        (Input(name="x", kind="image"), [[1]], InputError, "must be an image file"),
        (Input(name="x", kind="audio"), "voice.wav", InputError, "must be a sound file"),
        (Input(name="x", kind="bytes"), None, InputError, "must be bytes"),
    ],
)
def test_what_does_not_fit_is_refused(
    wanted: Input, value: Any, error: type[GpuinferError], words: str
) -> None:
    """As the worker would, with the same codes."""
    with pytest.raises(error) as caught:
        validator(wanted).check(value)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert caught.value.field == "inputs"


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


FREE = Input(name="x", kind="tensor", dtype="bfloat16", shape=(-1, 2))
PLAIN = Input(name="x", kind="tensor", dtype="float32", shape=(2,))


@pytest.mark.parametrize(
    ("wanted", "file", "found"),
    [
        (PLAIN, _npy(np.array([1, 2])), [1, 2]),
        (PLAIN, {"b64": _npy(np.array([1, 2])), "name": "any.thing"}, [1, 2]),
        (DIGIT, {"b64": _npy(np.ones((1, 2, 2))), "name": "upload.bin"}, [[[1, 1], [1, 1]]]),
        (DIGIT, {"b64": base64.b64encode(_npy(np.ones((1, 2, 2)))).decode()}, [[[1, 1], [1, 1]]]),
        (PLAIN, np.array([1, 2], "<f4").tobytes(), [1, 2]),
        (PLAIN, {"b64": np.array([1, 2], "<f4").tobytes(), "name": "upload.bin"}, [1, 2]),
        (PLAIN, {"b64": base64.b64encode(np.array([1, 2], "<f4").tobytes()).decode()}, [1, 2]),
        (FREE, bytes.fromhex("803f0040 00000000"), [[1, 2], [0, 0]]),
    ],
)
def test_a_file_stands_for_an_array(wanted: Input, file: Any, found: list[Any]) -> None:
    """One of numpy's by how it begins; an array's bytes where dtype and shape are known; in base64 or not."""
    one = validator(wanted)
    unwrapped = one.unwrapped(file)
    one.check(unwrapped)
    assert unwrapped.tolist() == found


@pytest.mark.parametrize(
    ("wanted", "file", "words"),
    [
        (PLAIN, b"1234567", "is a file of 7 bytes; shape [2] of float32 takes 8 bytes"),
        (FREE, b"123456", "shape [-1, 2] of bfloat16 takes a multiple of 4 bytes"),
        (FREE, b"", "takes a multiple of 4 bytes"),
        (Input(name="x", kind="tensor", dtype="int8", shape=(-1, -1)), b"1", "takes a .npy file or JSON"),
        (PLAIN, {"b64": "A"}, "is not valid base64"),
        (PLAIN, {"b64": b"x", "name": "x.npy"}, "is not a .npy file"),
    ],
)
def test_a_file_that_is_no_such_array(wanted: Input, file: Any, words: str) -> None:
    """How many bytes it would have to have is said."""
    with pytest.raises(InputError) as caught:
        validator(wanted).unwrapped(file)
    assert words in str(caught.value)


def test_null_for_a_model_that_allows_nan() -> None:
    """It is a number there, and nowhere else."""
    lenient = replace(PLAIN, allow_nan=True)
    validator(lenient).check([None, 1.5])
    for strict in (PLAIN, replace(lenient, dtype="int64")):
        with pytest.raises(DtypeMismatch, match="holds null"):
            validator(strict).check([None, 1])


def test_json_is_checked_by_its_schema() -> None:
    """The error names the place; no value is told."""
    for value, field in (
        ({"text": "secret"}, "inputs.text"),
        ({"text": "a", "n": 0}, "inputs.n"),
        ([], "inputs"),
    ):
        with pytest.raises(InputError) as caught:
            validator(DOC).check(value)
        assert caught.value.field == field
        assert "secret" not in str(caught.value)


def test_inputs_by_name() -> None:
    """Each is checked, with its name in the field; none is missing, and none too many."""
    both = validator(DIGIT, DOC)
    both.check({"image": b"a picture", "doc": {"text": "a"}})
    for value, error, field in (
        ({"image": b"x", "doc": {"text": 1}}, InputError, "inputs.doc.text"),
        ({"image": [1], "doc": {"text": "a"}}, ShapeMismatch, "inputs.image"),
        ({"image": b"x"}, MissingInput, "inputs.doc"),
        ({"image": b"x", "doc": {"text": "a"}, "more": 1}, InputError, "inputs"),
        (b"x", InputError, "inputs"),
    ):
        with pytest.raises(error) as caught:
            both.check(value)
        assert caught.value.field == field


def test_an_only_input_may_be_named() -> None:
    """As a form does it; a file may have any name; an object of JSON stays what it is."""
    assert validator(DIGIT).unwrapped({"image": b"x"}) == b"x"
    assert validator(DIGIT).unwrapped({"picture": {"b64": b"x", "name": "a.png"}}) == {
        "b64": b"x",
        "name": "a.png",
    }
    assert validator(DIGIT).unwrapped({"image": [[[1]]]}) == [[[1]]]
    assert validator(DIGIT).unwrapped({"picture": [1]}) == {"picture": [1]}
    assert validator(DOC).unwrapped({"doc": {"text": "a"}}) == {"doc": {"text": "a"}}


def test_a_file_may_stand_for_what_it_holds() -> None:
    """A form's file of text, of JSON, of an array; one that is something else is refused."""
    text = Input(name="letter", kind="text")
    array = io.BytesIO()
    np.save(array, np.arange(3))
    assert validator(text).unwrapped({"b64": b"Guten Tag", "name": "a.md"}) == "Guten Tag"
    assert validator(DOC).unwrapped({"b64": b'{"text": "a"}', "name": "a"}) == {"text": "a"}
    assert validator(IDS).unwrapped({"b64": array.getvalue(), "name": "a.npy"}).tolist() == [0, 1, 2]
    both = validator(DIGIT, text).unwrapped({"image": b"x", "letter": {"b64": b"hi", "name": "a.txt"}})
    assert both == {"image": b"x", "letter": "hi"}
    for wanted, content in ((text, b"\xff"), (DOC, b"{")):
        with pytest.raises(InputError, match=r"a\.txt"):
            validator(wanted).unwrapped({"b64": content, "name": "a.txt"})


def test_a_job() -> None:
    """One array of items is checked as a whole; of a list, each item is its own affair."""
    one = validator(DIGIT)
    one.check(np.zeros((7, 1, 2, 2)), many=True)
    one.check([[1], "nonsense"], many=True)
    with pytest.raises(ShapeMismatch):
        one.check(np.zeros((7, 2, 2)), many=True)


def test_a_large_request_costs_no_more_than_a_small_one() -> None:
    """A list of a million numbers, JSON of a million values: checked in the time of thousands, not in 300."""
    numbers = Input(name="x", kind="tensor", dtype="float32", shape=(-1,))
    few, many = 3000, 1_000_000
    for wanted, value in ((numbers, 0.5), (DOC, 0)):
        check = validator(wanted).check
        small, large = (
            min(timeit.repeat(partial(check, [value] * count), number=1, repeat=100)) for count in (few, many)
        )
        assert large < 30 * small
    with pytest.raises(InputError):
        validator(DOC).check([0] * (MAX_VALUES - 1))


@pytest.mark.parametrize(
    "schema", [{"pattern": "(a+)+$(?=b)"}, {"$ref": "http://127.0.0.1:9/x"}, {"type": 7}]
)
def test_a_schema_that_cannot_be_used_refuses_nothing(schema: dict[str, Any]) -> None:
    """It comes from a worker: nothing is fetched for it, no pattern of it may take for ever."""
    validator(Input(name="x", schema=schema)).check("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab")


def test_without_the_library_kinds_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A light client leaves the schema to the front, or the worker."""
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    light = validator(DOC)
    light.check({"text": 7})
    with pytest.raises(InputError):
        validator(Input(name="x", kind="text")).check(7)


def said(*signatures: Signature) -> bytes:
    """Return what Redis has of a model where workers, one each, have said these."""
    texts = [orjson.dumps(one.to_json()).decode() for one in signatures]
    digests = {text: str(number) for number, text in enumerate(dict.fromkeys(texts))}
    who = {f"gpu0@h{number}": [1, digests[text]] for number, text in enumerate(texts)}
    return orjson.dumps({"said": who, "texts": {digest: text for text, digest in digests.items()}})


def test_what_one_of_several_versions_takes_is_taken() -> None:
    """By hosts that have different versions of a model; the error is by the one that most have."""
    known = Signatures()
    old, new = (Signature(inputs=(Input(name="x", kind="tensor", shape=(size,)),)) for size in (2, 3))
    known.found("m", said(old, new, new))
    assert known.ready("m", [1, 2], many=False) == [1, 2]
    assert known.ready("m", [1, 2, 3], many=False) == [1, 2, 3]
    with pytest.raises(ShapeMismatch, match=r"the model wants \[3\]"):
        known.ready("m", [1], many=False)
    assert known.of("m") == new
    body = orjson.loads(said(old, new))
    body["texts"]["1"] = "of another edition"
    known.found("m", orjson.dumps(body))
    assert known.ready("m", [1], many=False) == [1], "what that version takes is not known"


def test_what_is_remembered() -> None:
    """For a while; a refusal by what is not quite new is doubted; nonsense is no signature."""
    now = [100.0]
    known = Signatures(lambda: now[0])
    assert known.stale("digits")
    known.found("digits", said(Signature(inputs=(DIGIT,))))
    assert not known.stale("digits")
    assert not known.doubts("digits")
    with pytest.raises(ShapeMismatch, match="input 2 of 2 has shape"):
        known.all_ready("digits", [b"x", [1]], many=False)
    now[0] += SURE_S + 0.1
    assert known.doubts("digits")
    now[0] += FRESH_S
    assert known.stale("digits")
    smell = b'{"said": {"w": [1, "d"]}, "texts": {"d": "{\\"inputs\\": [{\\"kind\\": \\"smell\\"}]}"}}'
    for nonsense in (None, b"", b"{", b"[]", b"{}", b'{"said": {"w": [1, "d"]}, "texts": {}}', smell):
        known.found("digits", nonsense)
        assert known.ready("digits", "anything", many=False) == "anything"
        assert known.ready(None, "anything", many=False) == "anything"


def test_a_signature_is_read_as_it_was_written() -> None:
    """With the file that may stand for a tensor."""
    one = Signature(inputs=(DIGIT, DOC, replace(PLAIN, allow_nan=True)), named=True)
    assert Signature.from_json(orjson.loads(orjson.dumps(one.to_json()))) == one
