# SPDX-License-Identifier: Apache-2.0
"""From a body to what is submitted."""

from __future__ import annotations

import json
import math
from itertools import accumulate

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuinfer.api import schemas
from gpuinfer.api.admission import FIELDS, admit, parse_json
from gpuinfer.api.predict_schemas import PREDICT_BODY
from gpuinfer.api.waiting import waiting_time
from gpuinfer.client import Options
from gpuinfer.client.submissions import build
from gpuinfer.errors import GpuinferError, InputError, MalformedJson
from gpuinfer.models.shipped import load_test_images
from gpuinfer.queue import message
from gpuinfer.queue.bodies import check_depth
from gpuinfer.queue.submission import Json

pytestmark = pytest.mark.unit


def test_a_list_is_the_inputs() -> None:
    """A bare list has no options."""
    asked = admit(b"[[1, 2], [3, 4]]")
    assert asked.inputs == Json(b"[[1, 2], [3, 4]]", [[1, 2], [3, 4]])
    assert asked.options == {}


@pytest.mark.parametrize(
    "body", [{"b64": "AAAA"}, {"b64": "AAAA", "name": "a.jpg"}, {"b64": "", "dtype": "uint8", "shape": [0]}]
)
def test_a_file_or_an_array_is_the_inputs(body: dict[str, object]) -> None:
    """In base64, as a bare list is; what stands beside its keys is no option."""
    assert admit(orjson.dumps(body)).inputs == Json(orjson.dumps(body), body)
    with pytest.raises(InputError, match="unknown field"):
        admit(orjson.dumps(body | {"model": "digits"}))


def test_an_object_names_its_options() -> None:
    """Fields beside inputs are options; a null one counts as not given."""
    asked = admit(b'{"inputs": 5, "model": "digits", "priority": 9, "queue": null}')
    assert asked.inputs == Json(b"5", 5)
    assert asked.options == {"model": "digits", "priority": 9}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b" [1e2, 1.50]\n", b"[1e2, 1.50]"),
        (b'{"inputs": [1e2]}', b"[1e2]"),
        (b'{ "inputs" :\t[1e2]\n, "model" : "m"}', b"[1e2]"),
        (b'{"model": "m", "inputs": {"a": "}", "b": [1]} }', b'{"a": "}", "b": [1]}'),
        (b'{"priority": 1, "inputs": "a, b" , "model": "m"}', b'"a, b"'),
        # Not plain to see: a name twice, a backslash, no JSON numbers, a key to compare by.
        (b'{"inputs": 1, "inputs": 2}', None),
        (b'{"inputs": 1, "model": "a", "model": "b"}', None),
        (b'{"inputs": {"model": 1}, "model": "m"}', None),
        (b'{"inputs": 1, "\\u0069nputs": 2}', None),
        (b'{"inputs": "\\n"}', None),
        (b"[NaN]", None),
        (b'{"inputs": [1], "idempotency_key": "k"}', None),
    ],
)
def test_the_text_of_the_inputs_is_passed_on(body: bytes, text: bytes | None) -> None:
    """As the caller wrote it, where it is plain to see where it stands; else it is written anew."""
    inputs = admit(body).inputs
    assert (inputs.text if isinstance(inputs, Json) else None) == text


KEYS = st.sampled_from(["inputs", "model", "priority", "queue", "a", 'b"', "}", ","])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_the_text_says_what_the_inputs_are(value: dict[str, object], spaced: bool) -> None:
    """Wherever a text is found, it is valid JSON and has the value of the inputs."""
    body = json.dumps(value, separators=(" , ", " : ") if spaced else (",", ":")).encode()
    try:
        inputs = admit(body).inputs
    except InputError:
        return
    if isinstance(inputs, Json):
        assert orjson.loads(inputs.text) == inputs.value == value["inputs"]


def test_every_option_of_the_client_is_a_field() -> None:
    """What a client may say, an HTTP caller may say, and /docs tells of it."""
    assert set(FIELDS) == {"inputs", *Options.__annotations__}
    documented = PREDICT_BODY["requestBody"]["content"]["application/json"]["schema"]["anyOf"][1]
    assert set(documented["properties"]) == set(FIELDS)


@pytest.mark.parametrize("name", ["foo", "many", "clock", "Inputs"])
def test_an_unknown_field_is_named(name: str) -> None:
    """Neither ignored nor passed on, even where our own function has a parameter of that name."""
    with pytest.raises(InputError, match="known: inputs, model") as caught:
        admit(orjson.dumps({"inputs": 1, name: 2}))
    assert caught.value.field == name


@pytest.mark.parametrize("body", [b'"text"', b"null", b"true", b"3"])
def test_neither_list_nor_object(body: bytes) -> None:
    """A bare scalar is refused with what would be right."""
    with pytest.raises(InputError, match="must be a JSON list or an object with inputs"):
        admit(body)


def test_an_object_without_inputs() -> None:
    """The missing field is named."""
    with pytest.raises(InputError) as caught:
        admit(b'{"model": "digits"}')
    assert caught.value.field == "inputs"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[1,\n 2,,]", "line 2, column 4"),
        (b"[NaN,", "line 1, column 6"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested deeper"),
        (b"[NaN," + b"[" * 100_000, "nested deeper"),
        (b"[NaN, \xff]", "not JSON"),
    ],
)
def test_no_json_is_told_with_its_place(body: bytes, words: str) -> None:
    """400 with line and column; no input, however deep or broken, is anything else."""
    with pytest.raises(MalformedJson, match=words) as caught:
        admit(body)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"inputs": [NaN], "top_k": 100000000000000000000000000}', "top_k"),
        (b'{"inputs": [NaN], "model": "\\ud83d"}', "model"),
        (b'{"inputs": [NaN], "idempotency_key": "\\ud83d"}', "idempotency_key"),
        (b'{"inputs": {"\\ud83d": NaN}}', "inputs"),
    ],
)
def test_what_pythons_parser_lets_through_is_refused_by_name(body: bytes, field: str) -> None:
    """Beside a NaN, huge integers and half surrogate pairs are no crash but a 422 with the field."""
    asked = admit(body)
    with pytest.raises(InputError) as caught:
        build(asked.inputs, many=False, **asked.options).pack()
    assert (caught.value.http_status, caught.value.field) == (422, field)


@pytest.mark.parametrize("number", [b"1" + b"0" * 5000, b"1e400", b"-" + b"9" * 400])
def test_numbers_beyond_a_double_are_no_json(number: bytes) -> None:
    """With a NaN beside them or without, 400; 65 bits and more become a double, as they do without."""
    for body in (b"[%b]" % number, b"[NaN, %b]" % number):
        with pytest.raises(MalformedJson):
            admit(body)
    assert admit(b"[NaN, 100000000000000000000]").inputs[1] == 1e20
    assert type(admit(b"[NaN, 18446744073709551615]").inputs[1]) is int


def test_nesting_is_bounded() -> None:
    """Deeper than 200 is a 400, wherever it is; brackets in texts do not count."""
    admit(b"[" * 200 + b"]" * 200)
    admit(orjson.dumps(["[" * 500, '"' + "{" * 500, "\\" * 3 + '"[[[' * 300]))
    for body in (b"[" * 201 + b"]" * 201, b'{"a":' * 150 + b"[" * 60, b'["\\\\", ' * 201):
        with pytest.raises(MalformedJson, match="nested deeper than 200"):
            admit(body)
    with pytest.raises(MalformedJson, match="more quotation marks"):
        admit(b'"' * 10_000 + b"[" * 300)


_STRINGS = ('"x"', '"[{"', r'"\"]"', r'"\\"', r'"\\\"["')


@given(
    st.lists(st.sampled_from(["[", "{", "]", "}", ",", "[{[{", *_STRINGS]), max_size=60), st.integers(0, 12)
)
def test_depth_is_counted_outside_strings(parts: list[str], most: int) -> None:
    """As by one who goes from letter to letter."""
    brackets = [letter for part in parts if part not in _STRINGS for letter in part]
    deepest = max(accumulate((letter in "[{") - (letter in "]}") for letter in brackets), default=0)
    try:
        check_depth("".join(parts).encode(), most)
    except MalformedJson as exc:
        assert deepest > most or "quotation marks" in str(exc)
    else:
        assert deepest <= most


_NAMES = st.sampled_from(["inputs", "model", "queue", "x"])
_VALUES = st.recursive(
    # orjson reads larger integers as floats
    st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | _NAMES
    | st.text('aé,}]: "\\NI[', max_size=5),
    lambda inner: st.lists(inner, max_size=80) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=100,
)


@given(_VALUES, st.sampled_from(["m", "inputs", "x"]), st.booleans(), st.sampled_from([None, 1]))
def test_the_text_of_the_inputs_says_what_they_are(
    value: object, model: str, first: bool, indent: int | None
) -> None:
    """Wherever they stand, with few strings or many; no text where a key could be mistaken."""
    fields = {"inputs": value, "model": model} if first else {"model": model, "inputs": value}
    body = json.dumps(fields, indent=indent, ensure_ascii=False).encode()
    inputs = admit(body).inputs
    if isinstance(inputs, Json):
        assert orjson.loads(inputs.text) == inputs.value == value
        assert inputs.text in body
    else:
        assert inputs == value
    plain = b"\\" not in body and all(body.count(name) == 1 for name in (b'"inputs"', b'"model"'))
    assert isinstance(inputs, Json) == (plain and b"NaN" not in body and b"Infinity" not in body)


def test_a_byte_order_mark_is_taken() -> None:
    """Windows tools write one before UTF-8."""
    assert admit(b"\xef\xbb\xbf[1]").inputs == [1]


def test_nan_reaches_the_worker_as_nan() -> None:
    """It is neither a crash nor silently a null: the worker tells which input it was."""
    asked = admit(b'{"inputs": [1.5, NaN, -Infinity], "priority": 1}')
    envelope = message.decode(build(asked.inputs, many=False, **asked.options).encode())
    (inputs,), _, _ = envelope.body()
    assert inputs[0] == 1.5
    assert math.isnan(inputs[1])
    assert inputs[2] == -math.inf


def test_the_header_is_the_key() -> None:
    """Header and field may say the same, not two things."""
    assert admit(b"[1]", header_key="a").options == {"idempotency_key": "a"}
    assert admit(b'{"inputs": 1, "idempotency_key": "a"}', header_key="a").options["idempotency_key"] == "a"
    with pytest.raises(InputError, match="differs"):
        admit(b'{"inputs": 1, "idempotency_key": "b"}', header_key="a")


@pytest.mark.parametrize(
    "option",
    [
        {"queue": "fast"},
        {"priority": 10},
        {"priority": "9"},
        {"priority": True},
        {"model": 7},
        {"model": ""},
        {"top_k": 0},
        {"top_k": "3"},
        {"encoding": "hex"},
        {"expires_s": -1},
        {"expires_s": 1e308},
        {"expires_s": math.nan},
        {"time_limit_s": "5"},
        {"soft_time_limit_s": 0},
        {"ignore_result": "false"},
        {"idempotency_key": "k" * 201},
    ],
)
def test_bad_options_name_themselves(option: dict[str, object]) -> None:
    """Refused where they are submitted, not when a worker has them in its hands."""
    with pytest.raises(InputError) as caught:
        build([1], many=False, **option)  # type: ignore[arg-type]  # that is the test
    assert caught.value.field == next(iter(option))


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, 0), ("0", 0), ("2.5", 2.5), ("1e9", 60), ("inf", 60), (" 3 ", 3)]
)
def test_waiting_is_cut(text: str | None, seconds: float) -> None:
    """No caller waits longer than the administrator allows."""
    assert waiting_time(text, 60) == seconds


@pytest.mark.parametrize("text", ["-1", "nan", "x", "", "-inf"])
def test_no_waiting_time(text: str) -> None:
    """NaN and negative times are refused by name."""
    with pytest.raises(InputError) as caught:
        waiting_time(text, 60)
    assert caught.value.field == "wait"


@given(st.binary(max_size=200))
def test_no_bytes_crash_it(body: bytes) -> None:
    """Any body is understood or refused with one of our errors."""
    try:
        admit(body)
    except GpuinferError as exc:
        assert exc.http_status in (400, 422)


def test_json_passes_through_the_message() -> None:
    """What the worker reads is the caller's text; a job's must be a list."""
    asked = admit(b'{"inputs": [1.50, 2e0], "model": "m"}')
    task = build(asked.inputs, many=False, **asked.options)
    assert b"[1.50, 2e0]" in task.encode()
    assert message.decode(task.encode()).body()[0] == [[1.5, 2.0]]
    with pytest.raises(InputError, match="must be a list of inputs, got an object"):
        build(admit(b'{"inputs": {}}').inputs, many=True).encode()


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_inputs_come_out_of_the_message_unchanged(value: object) -> None:
    """Whatever JSON was sent, NaN and null included, is what the worker reads."""
    (inputs,), _, _ = message.decode(build(value, many=False).encode()).body()
    assert repr(inputs) == repr(value)


def test_the_example_is_a_real_digit() -> None:
    """/docs shows test image 0 of the shipped model."""
    images, labels = load_test_images()
    assert images[0].tolist() == schemas.DIGIT
    assert labels[0] == 2


def test_parse_json_keeps_big_numbers_finite() -> None:
    """A number beyond a double is no JSON we can read; one beyond 64 bits is a float."""
    with pytest.raises(MalformedJson):
        parse_json(b"[1e400]")
    assert parse_json(b"[123456789012345678901234567890]") == [1.2345678901234568e29]
