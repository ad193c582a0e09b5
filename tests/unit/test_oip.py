# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol: from the bytes of a request to a task's inputs, and back from its result."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest
from starlette.types import Message, Scope

from gpuinfer.api.drain import Drain
from gpuinfer.api.oip import inputs as taking
from gpuinfer.api.oip.errors import send_error, status_of
from gpuinfer.api.oip.inputs import Inputs
from gpuinfer.api.oip.outputs import outputs_of
from gpuinfer.api.oip.replies import write
from gpuinfer.api.oip.requests import Tensor, Wanted, read
from gpuinfer.api.shared import Shared
from gpuinfer.errors import (
    DtypeMismatch,
    GpuinferError,
    InferenceError,
    InputError,
    MalformedJson,
    MissingInput,
    PayloadTooLarge,
    QueueFull,
    ShapeMismatch,
    TaskExpired,
    TaskRevoked,
    UnknownModel,
)
from gpuinfer.models.signature import Input, Output, Signature
from gpuinfer.queue import results
from gpuinfer.settings import Settings

pytestmark = pytest.mark.unit

X = Input(name="x", kind="tensor", dtype="float32", shape=(2,))
TEXT = Input(name="t", kind="text")
SCORES = Output(name="c", kind="classification", dtype="float32", shape=(2,))


def inputs_of(tensors: list[Tensor], signature: Signature) -> Inputs:
    return taking.inputs_of(tensors, signature, 10)


def body(*inputs: dict[str, Any], rest: bytes = b"", **more: Any) -> tuple[bytes, str]:
    text = orjson.dumps({"inputs": inputs, **more})
    return text + rest, str(len(text))


def one(datatype: str, shape: list[int], data: Any = None, size: int | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": shape}
    if size is None:
        return entry | {"data": data}
    return entry | {"parameters": {"binary_data_size": size}}


def test_bytes_lie_where_they_came_in() -> None:
    """An array is a view of the body, in the order of the inputs; an id and parameters are kept."""
    whole = np.arange(6, dtype="<f4")
    text, length = body(
        one("FP32", [3, 2], size=24),
        {"name": "y", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 11}},
        rest=whole.tobytes() + b"\2\0\0\0ab\1\0\0\0\xff",
        id="7",
        parameters={"priority": 1, "binary_data_output": True},
        outputs=[{"name": "c"}, {"name": "d", "parameters": {"binary_data": False, "classification": 3}}],
    )
    found = read(text, length)
    x, y = found.inputs
    assert isinstance(x.data, np.ndarray)
    assert np.array_equal(x.data, whole.reshape(3, 2))
    assert np.shares_memory(x.data, np.frombuffer(text, np.uint8))
    assert y.data == [b"ab", b"\xff"]
    assert (found.id, found.parameters["priority"], found.binary) == ("7", 1, True)
    assert found.outputs == (Wanted("c", True), Wanted("d", False, 3))


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (one("FP32", [2, 2], [1, 2.5, None, 4]), [[1, 2.5], [None, 4]]),
        (one("FP16", [2, 2], [[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (one("UINT8", [2], [0, 255]), [0, 255]),
        (one("BOOL", [1], [True]), [True]),
        (one("BF16", [1], [1.5]), [1.5]),
        (one("INT64", [0], []), []),
    ],
)
def test_numbers_in_json(entry: dict[str, Any], found: list[Any]) -> None:
    """Flat or nested; null is NaN."""
    (x,) = read(*body(entry)).inputs
    assert orjson.loads(orjson.dumps(x.data, option=orjson.OPT_SERIALIZE_NUMPY)) == found


@pytest.mark.parametrize(
    ("entry", "rest", "error", "words"),
    [
        (one("FP8", [1], [1]), b"", DtypeMismatch, "inputs.x.datatype: must be one of BOOL, INT8"),
        (one("FP32", [-1], [1]), b"", ShapeMismatch, "inputs.x.shape: must be a list"),
        (one("FP32", [0, 2**31 - 1, 2**31 - 1], []), b"", ShapeMismatch, "inputs.x.shape: has more than"),
        (one("FP32", [2], [1]), b"", ShapeMismatch, "has 1 elements, its shape [2] has 2"),
        (one("FP32", [2, 2], [[1], [2, 3, 4]]), b"", ShapeMismatch, "nested like its shape"),
        (one("FP32", [1], ["1"]), b"", DtypeMismatch, "holds a string, its datatype is FP32"),
        (one("INT8", [1], [1.0]), b"", DtypeMismatch, "holds a fractional number"),
        (one("INT8", [1], [300]), b"", DtypeMismatch, "outside the range of INT8"),
        (one("FP16", [1], [1e10]), b"", DtypeMismatch, "outside the range of FP16"),
        (one("BYTES", [1], [1]), b"", DtypeMismatch, "each element of BYTES must be a string"),
        (one("FP32", [2], size=7), b"1234567", ShapeMismatch, "has 7 bytes; shape [2] of FP32 takes 8"),
        (one("FP32", [2], size=8), b"1234567", InputError, "a number of bytes; 7 are left"),
        (one("FP32", [1], size=4), b"12345", InputError, "1 bytes after the JSON belong to no input"),
        (one("BOOL", [1], size=1), b"\2", DtypeMismatch, "a byte 0 or 1"),
        (one("BYTES", [1], size=5), b"\2\0\0\0a", ShapeMismatch, "must hold 1 elements"),
        (one("BYTES", [1], size=4), b"\xff\xff\xff\xff", ShapeMismatch, "must hold 1 elements"),
        (
            one("FP32", [1], [1]) | {"parameters": {"shared_memory_region": "r"}},
            b"",
            InputError,
            "not supported",
        ),
        ({"datatype": "FP32"}, b"", InputError, "must be an object with a name"),
    ],
)
def test_a_wrong_tensor_is_named(
    entry: dict[str, Any], rest: bytes, error: type[GpuinferError], words: str
) -> None:
    """With what would be right."""
    text, length = body(entry, rest=rest)
    with pytest.raises(error) as caught:
        read(text, length)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "length", "words"),
    [
        (b"", "", "empty"),
        (b"[]", "", "must be a JSON object"),
        (b"{}", "", "inputs: must be a list of tensors"),
        (b'{"inputs": []}', "", "inputs: must be a list of tensors"),
        (b"{}", "3", "Inference-Header-Content-Length: must be the number of bytes"),
        (b"{}", "x", "Inference-Header-Content-Length"),
        (b"{}", "9" * 5000, "Inference-Header-Content-Length"),
        (b'{"inputs": [{"name": "x"}, {"name": "x"}]}', "", "inputs: must have unique names"),
        (b'{"id": 1, "inputs": [{"name": "x"}]}', "", "id: must be a string"),
        (b'{"parameters": 1, "inputs": [{"name": "x"}]}', "", "parameters: must be an object"),
    ],
)
def test_a_wrong_request(text: bytes, length: str, words: str) -> None:
    """Says which field."""
    with pytest.raises((InputError, MalformedJson)) as caught:
        read(text, length)
    assert words in str(caught.value)


def test_a_batch_is_one_input_or_a_job() -> None:
    """By its first dimension; of a model without a batch all of it is the input."""
    two = np.ones((2, 2), np.float32)
    alone = inputs_of([Tensor("x", "FP32", (1, 2), two[:1])], Signature(inputs=(X,)))
    assert (alone.value.shape, alone.many, alone.items) == ((2,), False, 1)
    job = inputs_of([Tensor("x", "FP32", (2, 2), two)], Signature(inputs=(X,)))
    assert (job.value is two, job.many, job.items) == (True, True, 2)
    texts = Tensor("t", "BYTES", (2, 1), [b"a", "é".encode()])
    both = inputs_of([texts, Tensor("x", "FP32", (2, 2), two)], Signature(inputs=(X, TEXT), named=True))
    assert [row["t"] for row in both.value] == ["a", "é"]
    whole = inputs_of([Tensor("x", "UINT8", (2,), two[0])], Signature(inputs=(X,), batchable=False))
    assert (whole.value.shape, whole.items) == ((2,), None)
    files = Signature(inputs=(Input(name="f", kind="image"),))
    assert inputs_of([Tensor("f", "BYTES", (1,), [b"jpeg"])], files).value == {"b64": b"jpeg", "name": ""}
    some = Signature(inputs=(Input(name="j"),))
    assert inputs_of([Tensor("j", "BYTES", (1,), [b'{"a": 1}'])], some).value == {"a": 1}
    assert inputs_of([Tensor("j", "FP32", (1, 2), two[:1])], some).value == [1.0, 1.0]


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ([], MissingInput, "inputs.x: is missing"),
        ([Tensor("y", "FP32", (1, 2), np.ones((1, 2)))], InputError, "inputs.y: is not an input"),
        ([Tensor("x", "FP32", (), np.ones(()))], ShapeMismatch, "first dimension must be the batch"),
        ([Tensor("x", "FP32", (0, 2), np.ones((0, 2)))], ShapeMismatch, "at least 1 item"),
        ([Tensor("x", "FP32", (11, 2), np.ones((11, 2)))], PayloadTooLarge, "queue.max_items is 10"),
        ([Tensor("x", "FP32", (2, 3), np.ones((2, 3)))], ShapeMismatch, "the model wants [-1, 2]"),
        (
            [Tensor("x", "BOOL", (2, 2), np.ones((2, 2), bool))],
            DtypeMismatch,
            "is BOOL, the model wants FP32",
        ),
        ([Tensor("x", "BYTES", (1,), [b"x"])], DtypeMismatch, "is BYTES, the model wants FP32"),
    ],
)
def test_what_the_model_does_not_take(tensors: list[Tensor], error: type[GpuinferError], words: str) -> None:
    """Also of a job, whose items nobody else looks at before they are queued."""
    with pytest.raises(error) as caught:
        inputs_of(tensors, Signature(inputs=(X,)))
    assert words in str(caught.value)


def _encoded(*values: float) -> dict[str, Any]:
    array = np.array(values, "<f4")
    return {"b64": base64.b64encode(array.tobytes()).decode(), "dtype": "float32", "shape": [len(values)]}


def test_results_become_tensors() -> None:
    """Scores as bytes; a Python model's answer by its keys; what differs between items is FP64, or JSON."""
    scores = Signature(inputs=(X,), outputs=(SCORES,))
    entries = [{"outputs": {"c": _encoded(i, 2)}, "model": "m", "device": "cpu"} for i in range(2)]
    (c,) = outputs_of(entries, scores, 2, None)
    assert (c.datatype, c.shape, c.data.tolist()) == ("FP32", (2, 2), [[0, 2], [1, 2]])  # type: ignore[union-attr]
    best = {
        "class": 1,
        "label": "b",
        "confidence": 0.5,
        "top_k": [{"class": 1, "label": "b", "confidence": 0.5}],
    }
    (c,) = outputs_of(best | {"model": "m"}, scores, 1, [Wanted("c", True, 1)])
    assert (c.datatype, c.shape, c.data) == ("BYTES", (1, 1), [b"0.500000:1:b"])
    free = Signature(inputs=(TEXT,))
    answers = [{"output": {"n": 1, "l": [1], "s": "x"}}, {"output": {"n": 1.5, "l": {}, "s": "yy"}}]
    n, s = outputs_of(answers, free, 2, [Wanted("n", False), Wanted("s", False)])
    assert (n.datatype, n.data.tolist(), s.data) == ("FP64", [1.0, 1.5], [b"x", b"yy"])  # type: ignore[union-attr]
    (whole,) = outputs_of({"output": [[1], "x"]}, free, 1, None)
    assert (whole.name, whole.datatype, whole.shape, whole.data) == ("output", "BYTES", (1,), [b'[[1],"x"]'])
    with pytest.raises(InferenceError, match="send them one by one"):
        outputs_of([{"outputs": {"c": _encoded(1)}}, {"outputs": {"c": _encoded(1, 2)}}], scores, 2, None)
    with pytest.raises(InputError, match=r"outputs\.d: is not an output; the model.s outputs are c"):
        outputs_of(entries, scores, 2, [Wanted("d", True)])
    with pytest.raises(InferenceError, match="item 1 of the batch: no"):
        failed = {"error": {"code": "inference_failed", "message": "no"}}
        outputs_of([entries[0], failed], scores, 2, None)


def test_bytes_stay_where_they_came_in() -> None:
    """From what Redis has answered to what is joined for the socket: no other copy of a large output."""
    array = np.arange(100_000, dtype=np.float32).reshape(1, 100, 1000)
    meta = results.success_in_bytes("t", {"outputs": {"y": array[0]}}, worker="w")
    result = results.parse("t", meta, raw=True).result
    model = Signature(inputs=(X,), outputs=(Output(name="y"),))
    (tensor,) = outputs_of(result, model, 1, None)
    assert np.shares_memory(np.asarray(tensor.data), np.frombuffer(meta, np.uint8))
    body, length = write({}, [tensor], {"y"})
    assert length is not None
    assert body[length:] == array.tobytes()
    assert orjson.loads(body[:length])["outputs"][0]["shape"] == [1, 100, 1000]


def test_an_answer_in_json_and_in_bytes() -> None:
    """Bytes stand behind the JSON in the order of their outputs; NaN is null in JSON."""
    tensors = [
        Tensor("a", "FP32", (2,), np.array([1, np.nan], np.float32)),
        Tensor("b", "BYTES", (1,), ["é".encode()]),
        Tensor("h", "FP16", (1,), np.array([1.5], np.float16)),
    ]
    text, length = write({"id": "1"}, tensors, ())
    assert length is None
    assert [one["data"] for one in orjson.loads(text)["outputs"]] == [[1.0, None], ["é"], [1.5]]
    text, length = write({}, tensors, ("a", "b"))
    assert text[length:] == np.array([1, np.nan], "<f4").tobytes() + b"\2\0\0\0" + "é".encode()
    assert [one.get("parameters") for one in orjson.loads(text[:length])["outputs"]] == [
        {"binary_data_size": 8},
        {"binary_data_size": 6},
        None,
    ]
    with pytest.raises(InferenceError, match="request it with binary_data"):
        write({}, [Tensor("b", "BYTES", (1,), [b"\xff"])], ())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ShapeMismatch, 400),
        (MalformedJson, 400),
        (PayloadTooLarge, 413),
        (UnknownModel, 404),
        (QueueFull, 429),
        (InferenceError, 500),
        (TaskExpired, 504),
        (TaskRevoked, 503),
    ],
)
def test_the_status_of_an_error(error: type[GpuinferError], status: int) -> None:
    """The protocol has no 422, and no 410."""
    assert status_of(error("x")) == status


async def test_who_is_refused_is_told_when_to_come_back() -> None:
    """By how fast the queues drain, as everywhere: the third within ten seconds of one task a second."""
    now = [0.0]
    shared = Shared(Settings())
    shared.drain = Drain(1, lambda: now[0])
    shared.drain.sample(0)
    now[0] = 10.0
    shared.drain.sample(10)
    scope: Scope = {"type": "http", "path": "/v2"}
    shared.enter(scope)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    for _ in range(3):
        await send_error(scope, send, QueueFull("as much waits as may"))
    head, body = sent[-2:]
    assert head["status"] == 429
    assert dict(head["headers"])[b"retry-after"] == b"3"
    assert set(orjson.loads(body["body"])) == {"error"}
