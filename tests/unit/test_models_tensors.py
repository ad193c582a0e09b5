# SPDX-License-Identifier: Apache-2.0
"""Decoding refuses what does not fit, names the field, and leaves the neighbours alone."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuinfer.errors import DtypeMismatch, InputError, MissingInput, NonFiniteInput, ShapeMismatch
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.specs import DTYPES
from gpuinfer.models.tensors import decode, decode_batch, encode_array

pytestmark = pytest.mark.unit

NUMPY_DTYPES = [name for name in DTYPES if name != "bfloat16"]


def _manifest(*inputs: dict[str, Any]) -> Manifest:
    return Manifest.model_validate(
        {"name": "m", "artefact": "m.pt", "inputs": inputs, "outputs": [{"name": "y"}]}
    )


def _one(shape: list[int], dtype: str = "float32", **more: Any) -> Manifest:
    return _manifest({"name": "x", "shape": shape, "dtype": dtype, **more})


TWO = _manifest({"name": "x", "shape": [2]}, {"name": "k", "shape": [], "dtype": "int64"})


def test_a_batch_of_lists() -> None:
    """Fixed shapes decode as one array, an item each."""
    items = decode_batch(_one([2, 1]), [[[1], [2.5]], [[3], [4]]])
    assert [item[0].tolist() for item in items if not isinstance(item, InputError)] == [
        [[1.0], [2.5]],
        [[3.0], [4.0]],
    ]


def test_scalars_are_arrays() -> None:
    """Shape () gives arrays without dimensions, in a batch and alone."""
    first, second = decode_batch(_one([]), [1, 2.5])
    assert not isinstance(first, InputError)
    assert first[0].shape == ()
    assert isinstance(first[0], np.ndarray)
    assert not isinstance(second, InputError)
    assert second[0] == 2.5


def test_nothing_in_nothing_out() -> None:
    """An empty batch is empty."""
    assert decode_batch(_one([2]), []) == []


def test_free_dimensions() -> None:
    """-1 takes any length of at least one, and lengths may differ between items."""
    good, longer, empty = decode_batch(_one([-1, 2]), [[[1, 2]], [[1, 2], [3, 4]], []])
    assert not isinstance(good, InputError)
    assert good[0].shape == (1, 2)
    assert not isinstance(longer, InputError)
    assert longer[0].shape == (2, 2)
    assert isinstance(empty, ShapeMismatch)


@pytest.mark.parametrize(
    ("dtype", "value", "error", "said"),
    [
        ("float32", [1, 2], ShapeMismatch, "has shape [2], the manifest wants [3]"),
        ("float32", [[1, 2, 3]], ShapeMismatch, "has shape [1, 3]"),
        ("float32", [1, 2, [3]], ShapeMismatch, "[3]"),
        ("float32", 5, ShapeMismatch, "is a number"),
        ("float32", "abc", ShapeMismatch, "is a string"),
        ("float32", None, ShapeMismatch, "is null"),
        ("float32", [1, 2, "3"], DtypeMismatch, "a string"),
        ("float32", [1, 2, True], DtypeMismatch, "true or false"),
        ("float32", [1, 2, None], DtypeMismatch, "null"),
        ("float32", [1, 2, {}], DtypeMismatch, "an object"),
        ("float32", [1, 2, 1e300], DtypeMismatch, "outside the range of float32"),
        ("float32", [1, 2, 10**400], DtypeMismatch, "outside the range of float32"),
        ("float16", [1, 2, 1e5], DtypeMismatch, "outside the range of float16"),
        ("bfloat16", [1, 2, 3.4e38], DtypeMismatch, "outside the range of bfloat16"),
        ("float32", [1, math.nan, 2], NonFiniteInput, "holds nan at position 1"),
        ("float64", [1, 2, -math.inf], NonFiniteInput, "holds -inf at position 2"),
        ("bfloat16", [1, 2, math.inf], NonFiniteInput, "inf"),
        ("int8", [1, 2, 128], DtypeMismatch, "outside the range of int8"),
        ("uint8", [1, 2, -1], DtypeMismatch, "outside the range of uint8"),
        ("int64", [1, 2, 2**63], DtypeMismatch, "outside the range of int64"),
        ("int32", [1, 2, 3.0], DtypeMismatch, "a fractional number"),
        ("int32", [1, 2, False], DtypeMismatch, "true or false"),
        ("bool", [True, False, 1], DtypeMismatch, "a number"),
    ],
)
def test_misfits_alone_and_in_a_batch(dtype: str, value: object, error: type[InputError], said: str) -> None:
    """Each misfit has its own error and field, and its neighbours still decode."""
    manifest = _one([3], dtype)
    good: list[object] = [True, False, True] if dtype == "bool" else [1, 2, 3]
    before, bad, after = decode_batch(manifest, [good, value, good])
    assert type(bad) is error
    assert said in bad.message
    assert bad.field == "inputs"
    for item in (before, after):
        assert not isinstance(item, InputError)
        assert item[0].tolist() == decode(manifest, good)[0].tolist()
    with pytest.raises(error):
        decode(manifest, {"x": value})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_null_is_nan_where_nan_is_allowed(dtype: str) -> None:
    """JSON has no other word for it; alone and in a batch, and never for a whole number."""
    manifest = _one([2], dtype, allow_nan=True)
    alone, _ = decode_batch(manifest, [[None, 1], [2, 3]])
    for item in (alone, decode(manifest, [None, 1])):
        assert not isinstance(item, InputError)
        bits = item[0].tolist()[0]
        assert bits == 0x7FC0 if dtype == "bfloat16" else math.isnan(bits)
    with pytest.raises(DtypeMismatch, match="null"):
        decode(_one([2], "int32", allow_nan=True), [None, 1])


def test_ragged_lists() -> None:
    """Lists of different lengths within one item are told as such."""
    with pytest.raises(ShapeMismatch, match="differ in length at depth 1"):
        decode(_one([2, 2]), [[1, 2], [3]])


def test_deep_nesting_is_refused_not_followed() -> None:
    """A list a thousand deep costs nothing more than a message."""
    value: list[Any] = [1]
    for _ in range(10_000):
        value = [value]
    with pytest.raises(ShapeMismatch):
        decode(_one([1]), value)


def test_nan_where_allowed() -> None:
    """allow_nan lets NaN and infinity through, yet no finite number that would become infinite."""
    manifest = _one([3], allow_nan=True)
    (array,) = decode(manifest, [math.nan, math.inf, 1])
    assert np.isnan(array[0])
    assert np.isinf(array[1])
    with pytest.raises(DtypeMismatch):
        decode(manifest, [1e300, 1, 1])


def test_several_inputs() -> None:
    """A mapping gives each input by name, in any order."""
    x, k = decode(TWO, {"k": 3, "x": [1, 2]})
    assert x.tolist() == [1, 2]
    assert k.tolist() == 3
    assert k.dtype == np.int64


@pytest.mark.parametrize(
    ("value", "error", "field"),
    [
        ([1, 2], InputError, "inputs"),
        (None, InputError, "inputs"),
        ({"b64": "", "dtype": "float32", "shape": []}, InputError, "inputs"),
        ({"x": [1, 2]}, MissingInput, "inputs.k"),
        ({"x": [1, 2], "k": 1, "y": 2}, InputError, "inputs"),
        ({"x": [1], "k": 1}, ShapeMismatch, "inputs.x"),
        ({"x": [1, 2], "k": 1.5}, DtypeMismatch, "inputs.k"),
        ({}, MissingInput, "inputs.x"),
    ],
)
def test_several_inputs_name_the_field(value: object, error: type[InputError], field: str) -> None:
    """The field is the input that does not fit."""
    bad, good = decode_batch(TWO, [value, {"x": [1, 2], "k": 1}])
    assert type(bad) is error
    assert bad.field == field
    assert not isinstance(good, InputError)


@given(data=st.data(), dtype=st.sampled_from(NUMPY_DTYPES))
@settings(max_examples=150, deadline=None)
def test_b64_round_trip(data: st.DataObject, dtype: str) -> None:
    """Bytes come back bit by bit, for every dtype numpy knows, NaN included."""
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    array = data.draw(hnp.arrays(dtype, shape))
    manifest = _one([-1] * len(shape), dtype, allow_nan=True)
    (back,) = decode(manifest, encode_array(array, "b64"))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(data=st.data(), dtype=st.sampled_from(NUMPY_DTYPES))
@settings(max_examples=150, deadline=None)
def test_list_round_trip(data: st.DataObject, dtype: str) -> None:
    """Lists of finite values come back the same, alone and in a batch."""
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
    array = data.draw(hnp.arrays(dtype, shape, elements=finite or None))
    value = encode_array(array)
    for item in decode_batch(_one(list(shape), dtype), [value, value]):
        assert not isinstance(item, InputError)
        assert item[0].dtype == array.dtype
        assert np.array_equal(item[0], array)


@given(st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=1))
@settings(deadline=None)
def test_bfloat16_rounds_to_nearest_even(values: list[float]) -> None:
    """The bits are the ones torch makes of the same numbers, from lists and back from bytes."""
    torch = pytest.importorskip("torch")
    (bits,) = decode(_one([-1], "bfloat16"), values)
    expected = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16).view(torch.int16).numpy()
    assert bits.dtype == np.uint16
    assert np.array_equal(bits.view(np.int16), expected)
    encoded = {"b64": base64.b64encode(bits.tobytes()).decode(), "dtype": "bfloat16", "shape": [len(values)]}
    assert np.array_equal(decode(_one([-1], "bfloat16"), encoded)[0], bits)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(value=JSON_VALUES, dtype=st.sampled_from(DTYPES), shape=st.sampled_from([[], [2], [-1], [2, -1]]))
@settings(max_examples=300, deadline=None)
def test_any_json_decodes_or_is_refused(value: object, dtype: str, shape: list[int]) -> None:
    """Whatever JSON comes, an item of the right shape or an InputError results, and nothing else."""
    (item,) = decode_batch(_one(shape, dtype), [value])
    if isinstance(item, InputError):
        assert str(item.field).startswith("inputs")
    else:
        assert item[0].ndim == len(shape)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"dtype": "float64"}, InputError, "b64 holds 8 bytes; shape [2] of float64 takes 16"),
        ({"dtype": "bool"}, DtypeMismatch, "is bool, the manifest wants float32"),
        ({"shape": [3]}, ShapeMismatch, "has shape [3]"),
        ({"shape": [2, 1]}, ShapeMismatch, "has shape [2, 1]"),
        ({"shape": "2"}, InputError, "shape must be a list of whole numbers"),
        ({"shape": [2.0]}, InputError, "shape must be a list of whole numbers"),
        ({"shape": [True]}, InputError, "shape must be a list of whole numbers"),
        ({"b64": "AAAA"}, InputError, "b64 holds 3 bytes; shape [2] of float32 takes 8"),
        ({"b64": "A!"}, InputError, "not valid base64"),
        ({"b64": "é"}, InputError, "not valid base64"),
        ({"b64": 5}, InputError, "b64 must be a string"),
        ({"extra": 1}, InputError, "keys b64, dtype and shape; this one lacks none and has 1 others"),
        (
            {"b64": base64.b64encode(np.array([1, np.nan], np.float32).tobytes()).decode()},
            NonFiniteInput,
            "nan",
        ),
    ],
)
def test_encoded_misfits(change: dict[str, object], error: type[InputError], said: str) -> None:
    """Each fault of an encoded tensor has its own words."""
    value = {**_encoded([1, 2]), **change}
    with pytest.raises(error) as caught:
        decode(_one([2]), value)
    assert type(caught.value) is error
    assert said in caught.value.message


SECRET = "PAYLOAD\ud800"


@pytest.mark.parametrize(
    ("manifest", "value"),
    [
        (_one([2]), {"x": {f"{SECRET}{number}": 0 for number in range(2000)}}),
        (_one([2]), {SECRET: [1, 2], "x": [1, 2]}),
        (_one([2]), {"b64": "", "dtype": SECRET, "shape": [2]}),
        (_one([2]), {"b64": "", "dtype": {SECRET: 1}, "shape": [2]}),
        (_one([2]), {"b64": SECRET, "dtype": "float32", "shape": [2]}),
        (_one([2]), {"b64": "", "dtype": "float32", "shape": [10**4000] * 99}),
        (_one([2]), [SECRET, SECRET]),
        (_one([2]), SECRET),
        (TWO, {SECRET: 1}),
    ],
)
def test_an_error_holds_nothing_of_what_was_sent(manifest: Manifest, value: object) -> None:
    """Its text is logged and goes into JSON: short, encodable, without a name or value of the caller's."""
    with pytest.raises(InputError) as caught:
        decode(manifest, value)
    text = str(caught.value)
    assert "PAYLOAD" not in text
    assert len(text.encode()) < 400


def _encoded(values: list[float]) -> dict[str, object]:
    encoded = encode_array(np.array(values, np.float32), "b64")
    assert isinstance(encoded, dict)
    return encoded


def test_encoded_bytes_are_little_endian() -> None:
    """The bytes are the same whatever the array's own order."""
    array = np.array([1, 2], dtype=">i2")
    assert encode_array(array, "b64") == {"b64": "AQACAA==", "dtype": "int16", "shape": [2]}


def test_encoded_bool_must_be_0_or_1() -> None:
    """Another byte would be an undefined bool."""
    with pytest.raises(DtypeMismatch, match="0 or 1"):
        decode(_one([1], "bool"), {"b64": "Ag==", "dtype": "bool", "shape": [1]})


def test_arrays_from_our_own_code() -> None:
    """An array is converted where every number survives, and refused where not."""
    manifest = _one([2], "uint8")
    assert decode(manifest, np.array([1, 255]))[0].dtype == np.uint8
    with pytest.raises(DtypeMismatch, match="range"):
        decode(manifest, np.array([1, 256]))
    with pytest.raises(DtypeMismatch, match="float64"):
        decode(manifest, np.array([1.0, 2.0]))
    with pytest.raises(ShapeMismatch):
        decode(manifest, np.array([1]))
    with pytest.raises(NonFiniteInput):
        decode(_one([1]), np.array([np.nan]))


def test_non_finite_outputs_are_null() -> None:
    """JSON has no NaN: a list gets null in its place, and the bytes stay exact."""
    assert encode_array(np.array([[1.5, np.nan], [np.inf, -2.0]])) == [[1.5, None], [None, -2.0]]
    assert encode_array(np.array(np.nan)) is None


@pytest.mark.parametrize(
    ("sent", "dtype", "wanted"),
    [
        (np.array([1, 255], np.uint8), "uint8", "float32"),
        (np.array([0.5, 2], np.float64), "float64", "float32"),
        (np.array([1, 255], np.uint16), "uint16", "uint8"),
        (np.array([1, -1], np.int64), "int64", "int8"),
    ],
)
def test_bytes_of_another_dtype(sent: np.ndarray[Any, Any], dtype: str, wanted: str) -> None:
    """Bytes that are told by their own dtype become the model's, where their numbers are numbers of it."""
    (found,) = decode(_one([2], wanted), encode_array(sent, "b64"))
    assert found.dtype == wanted
    assert found.tolist() == sent.tolist()


def test_bytes_that_do_not_fit_another_dtype() -> None:
    """Fractions are no whole numbers, 300 is no uint8, and 1e300 no float32."""
    for sent, wanted in (
        (np.array([0.5]), "int64"),
        (np.array([300]), "uint8"),
        (np.array([1e300]), "float32"),
    ):
        with pytest.raises(DtypeMismatch):
            decode(_one([1], wanted), encode_array(sent, "b64"))
